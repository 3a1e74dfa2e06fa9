"""The shared core: models and diffusion maths in torch, nothing else."""

"""`ldm`: a command-line toolkit for text-to-image latent diffusion models, from data to pictures."""

__version__ = "0.1.0"

"""The lesson: diffusion in two dimensions, where everything it does can be drawn."""

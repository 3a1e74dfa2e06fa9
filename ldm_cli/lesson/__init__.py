"""The lesson: diffusion in two dimensions, where every step can be plotted."""

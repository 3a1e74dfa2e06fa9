"""The pipeline from prompt to image."""

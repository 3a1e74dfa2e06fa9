"""What `ldm sample` does around the drawing: jobs, sheets, grids, files, provenance."""

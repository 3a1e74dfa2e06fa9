"""What `ldm sample` does beside generating pictures: jobs, sheets, grids, files, provenance."""

"""Metrics as pure functions, and what they were measured on."""

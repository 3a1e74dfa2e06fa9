"""Metrics as pure functions and accumulators."""

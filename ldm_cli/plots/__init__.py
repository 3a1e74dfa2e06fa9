"""Plots by matplotlib, which takes long to import: only what draws one imports this."""

"""Recipes: what a command is to do, as strict typed YAML."""

"""Recipes: each file documents a run and returns its configuration from get_config()."""

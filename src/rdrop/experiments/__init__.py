"""Recipes, one training loop, a comparison over seeds, and a report. See `rdrop --help`."""

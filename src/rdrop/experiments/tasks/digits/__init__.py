"""Digits: recipes, data, model, scores."""

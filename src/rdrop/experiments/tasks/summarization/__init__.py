"""Summarization: recipes, data, model, scores."""

"""Text classification: recipes, data, model, scores."""

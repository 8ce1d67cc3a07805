"""Image classification: recipes, data, model, scores."""

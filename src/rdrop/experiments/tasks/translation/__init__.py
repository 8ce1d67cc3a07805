"""Translation: recipes, data, model, scores."""

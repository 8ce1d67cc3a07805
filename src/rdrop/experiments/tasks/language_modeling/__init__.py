"""Language modeling: recipes, data, model, scores."""

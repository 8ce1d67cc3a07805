"""Training one recipe in one run folder: `trainer.train` is the whole of it, from top to bottom."""

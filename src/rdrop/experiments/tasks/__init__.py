"""The tasks: a folder each, with its recipes, data, model and metric. `task` has the protocol that all keep."""

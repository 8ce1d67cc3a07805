"""Carry out a command: the plan of a comparison, the jobs that train, the search, the display."""

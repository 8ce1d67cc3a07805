"""Comparisons as pages and tables: the page of the runs, and the one beside the published figures."""

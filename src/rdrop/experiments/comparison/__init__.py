"""Finished runs in, comparisons out: every arm against its baseline over the seeds that both have."""

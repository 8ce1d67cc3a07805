"""Beam search for the tasks that write text."""

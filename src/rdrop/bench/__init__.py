"""Measures what the loss costs, side by side with other ways to compute it: the command `rdrop bench`.

From logits (`rows.py`), from hidden states (`linear.py`) and in whole training steps (`steps.py`), each form measured
in the same run (`measure.py`); records as lines of JSON; tables (`table.py`) and plots (`plots.py`) made from records
alone.
"""

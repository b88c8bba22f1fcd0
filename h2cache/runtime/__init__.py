"""Follows a model's calls and skips what a method allows. Knows no model and no method by name.

`engine.py` is the way in: one call of the model, in order.
"""

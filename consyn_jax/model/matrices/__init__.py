"""Weights that are not trained: in fewer bits, and with an adapter beside them."""

"""Callbacks that observe a run: the user's own, and trackers such as TensorBoard."""

"""Data that the Python API accepts, converted to batches, and the model that a run starts from."""

"""Pallas kernels for GPUs; a readable reference for each is beside the code that uses it."""

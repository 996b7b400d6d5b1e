"""Pallas kernels for GPUs. Each has a reference implementation in plain JAX in `model/`."""

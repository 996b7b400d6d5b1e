"""Pallas kernels for GPUs that write 8-bit operands of matmuls, with their largest magnitudes."""

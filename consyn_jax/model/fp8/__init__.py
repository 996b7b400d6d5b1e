"""Matmuls in 8-bit floats: the scales, the products, and the functions that write operands."""

"""Matmuls of 8-bit floats: scales, the matmuls, and what writes their operands."""

"""Frozen weights: quantised matrices, and matrices with a LoRA adapter."""

"""Trainer for decoder language models in JAX on NVIDIA GPUs; importing it does not import JAX."""

__version__ = "0.1.0"

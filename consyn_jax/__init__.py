"""consyn_jax: a trainer for decoder language models in JAX on NVIDIA GPUs. Importing it imports neither JAX nor anything slow."""

__version__ = "0.1.0"

"""Convert a model to Hugging Face's format, GGUF or Orbax, and check the result."""

"""Models in the Hugging Face layouts, read and written as safetensors and JSON only."""

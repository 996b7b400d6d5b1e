"""Supported Hugging Face layouts, one per file: keys of config.json and names of tensors."""

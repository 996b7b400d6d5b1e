"""One file for each Hugging Face layout: its config.json and its tensors."""

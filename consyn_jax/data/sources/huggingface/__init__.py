"""Hugging Face datasets: files, directories of `save_to_disk`, and the Hub."""

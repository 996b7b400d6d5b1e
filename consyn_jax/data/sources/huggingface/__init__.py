"""Read Hugging Face datasets: files, directories written by `save_to_disk`, and the Hub."""

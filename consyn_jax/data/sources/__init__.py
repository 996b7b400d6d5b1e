"""Read documents from files, datasets and the Hugging Face Hub, with one reader for each type."""

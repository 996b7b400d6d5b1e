"""Choose a run's model, tokenizer, data, sequence length and batch size from its flags."""

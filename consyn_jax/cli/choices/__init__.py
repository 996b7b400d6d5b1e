"""Choices that a run's flags make: its model, tokenizer, data, length and batch."""

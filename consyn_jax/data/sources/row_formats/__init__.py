"""The formats of fine-tuning rows: one module per family."""

"""The formats of fine-tuning rows: one module a family."""

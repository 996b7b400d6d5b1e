"""Read the formats of fine-tuning rows, with one module per family of formats."""

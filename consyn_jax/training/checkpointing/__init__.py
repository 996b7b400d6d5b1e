"""Checkpoints of the training state: writing, verifying, rotating and restoring them."""

"""Optimizers, learning-rate schedules, skipping of non-finite steps, and optimizer offload."""

"""Optimizers as one table, schedules, skipped steps, and moments in host memory."""

"""Signals, watchdog, device memory, and the cache of compiled programs, for the training loop."""

"""Diagnostics of a run: profiles, learning-rate tests, non-finite values and their replay."""

"""Diagnostics: profiles, learning-rate range tests, non-finite values, and replay of steps."""

"""Modes of `consyn-train` that inspect a run without changing it."""

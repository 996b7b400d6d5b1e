"""Lanes: threads that train trials side by side, and share compiled programs."""

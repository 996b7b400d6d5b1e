"""Recognise splits, files that are not data, and structure that reading as text would lose."""

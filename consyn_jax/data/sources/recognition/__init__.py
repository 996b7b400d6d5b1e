"""Recognise splits, files that are not data, and fields that reading as text would lose."""

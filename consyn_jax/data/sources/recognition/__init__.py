"""Recognise splits, files that are not data, and structure that is lost in plain text."""

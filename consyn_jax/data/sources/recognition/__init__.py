"""Recognise splits, files beside the data that are not data, and structure that text ignores."""

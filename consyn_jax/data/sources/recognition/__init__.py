"""Recognise splits, non-data files beside the data, and overlooked structure in text."""

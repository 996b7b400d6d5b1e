"""Preparation of data: documents are cleaned, deduplicated, split and tokenised into a store."""

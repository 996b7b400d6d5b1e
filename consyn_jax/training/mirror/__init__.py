"""The copy of a run in a bucket: found and fetched at the start, kept up to date while it runs."""

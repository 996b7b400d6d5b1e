"""Preparation with many writers, which write the segments and shards of a corpus in parallel."""

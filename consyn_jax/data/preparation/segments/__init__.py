"""Many writers: a corpus cut into segments, which become the shards of a store in parallel."""

"""Buckets: their URLs, clients, copies in the cache, and the lease of a writer."""

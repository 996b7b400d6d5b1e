"""Cloud storage buckets: URLs, clients, cached copies, and a lease that allows one writer."""

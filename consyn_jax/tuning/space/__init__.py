"""The search space before and during a study: its checks, and points not yet tried."""

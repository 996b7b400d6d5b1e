"""Show a run while it trains: history in bounded memory, time by activity, charts."""

"""Views of a run while it runs: history in bounded memory, time by activity, charts."""

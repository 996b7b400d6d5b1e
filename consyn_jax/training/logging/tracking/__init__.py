"""Observers of a run: the user's own callbacks, and the trackers, which are callbacks too."""

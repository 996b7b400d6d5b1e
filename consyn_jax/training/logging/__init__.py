"""Reports of a run: metrics, trackers, console, plots and the final report."""

"""Record and show a run: metrics, trackers, console, plots and the HTML report."""

"""The copy of a run in a bucket: fetch it at the start, and update it while the run trains."""

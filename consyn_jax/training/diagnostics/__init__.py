"""Looking into a run: profiles, learning-rate tests, non-finite values and their replay."""

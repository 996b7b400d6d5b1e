"""`consyn-report`: runs read back from their directories, and shown side by side."""

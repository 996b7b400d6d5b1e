"""The device mesh, the processes of a run, the table of GPUs, and compiler settings."""

"""The device mesh, the processes of one run, the table of GPUs and the compiler's settings."""

"""The surroundings of the loop: signals, watchdog, device memory, and compilation cache."""

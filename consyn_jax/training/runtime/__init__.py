"""Around the loop: signals, watchdog, device memory and the compilation cache."""

"""The process and its job: other processes, signals, locks, caches, progress."""

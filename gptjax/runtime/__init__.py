"""The process and its job: other processes, preemption, the watchdog, locks, caches, progress."""

"""Planning a run before it is paid for: see `plan`."""

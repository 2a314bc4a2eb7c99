"""Planning of a run before it is paid for: memory, communication, time and cost."""

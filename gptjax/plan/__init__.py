"""Planning a run before it is paid for; `command` is where it begins."""

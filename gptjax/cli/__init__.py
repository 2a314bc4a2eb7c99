"""The `gptjax` command: its arguments, and a module for each subcommand."""

"""The `deepsic` command."""

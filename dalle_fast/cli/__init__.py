"""The command `dalle-fast` = `python -m dalle_fast.cli`."""

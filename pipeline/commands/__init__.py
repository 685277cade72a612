"""Commands that are more than a few lines: like `cli.py` they parse nothing, call the rooms below, and print."""

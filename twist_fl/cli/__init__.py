"""The `twist-fl` command: its words, and tables on the screen."""

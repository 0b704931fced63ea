"""The command line: the parser, the commands and what they need. Nothing here imports torch before a command runs."""

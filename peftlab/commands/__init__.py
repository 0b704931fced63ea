"""The command line: the parser, the commands and their helpers. No torch is imported before a command runs."""

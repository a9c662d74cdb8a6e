"""The command line: a module for each command, with a function that adds it to the parser and one that runs it."""

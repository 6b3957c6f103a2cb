"""The thin functions behind the command line: load, do, print what came of it."""

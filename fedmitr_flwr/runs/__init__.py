"""One run from outside: its directory, files written whole, log, events, resume."""

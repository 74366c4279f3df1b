"""Directory, files, log, events and resume of a run."""

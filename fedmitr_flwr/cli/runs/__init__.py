"""Commands that start a run or read its results."""

"""The stages in order, and what is watched and kept on the way."""

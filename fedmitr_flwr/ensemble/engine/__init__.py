"""How the teachers run fast: packed weights, hand-written passes, groups, precision."""

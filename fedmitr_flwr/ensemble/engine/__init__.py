"""Fast execution of the teachers: packed weights, hand-written passes, groups, precision."""

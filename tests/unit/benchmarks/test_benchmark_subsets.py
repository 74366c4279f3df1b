"""The table of teacher subsets, on made-up accuracies."""

from benchmarks.teacher_subsets import numbers, table


def test_subsets_are_compared_with_all_teachers_of_the_same_seed():
    accuracy = {(0, 1): 0.80, (0, 2): 0.90, (5, 1): 0.79, (5, 2): 0.87, (5, 3): 0.10}
    rows = [
        {"clients": 50, "count": count, "seed": seed, "global": value, "seconds_invert": 10.0 if count else 100.0}
        for (count, seed), value in accuracy.items()
    ]
    lines = table(rows).splitlines()
    assert lines[2] == "| 50 | all | 85.0 |  | 100 | 2 |"
    assert lines[3] == "| 50 | 5 | 58.7 | -2.0 (-3.0, -1.0) | 10 | 3 |"


def test_numbers_are_separated_by_commas():
    assert numbers("10, 50,") == [10, 50]

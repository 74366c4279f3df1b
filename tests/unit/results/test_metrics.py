"""The metrics beside accuracy, against values computed by hand."""

from __future__ import annotations

import pytest
import torch

from fedmitr_flwr.results.metrics import METRICS, balanced_accuracy, calibration_error, computed

LABELS = torch.tensor([0, 0, 0, 1])
PROBABILITIES = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.4, 0.6, 0.0], [0.7, 0.3, 0.0]])


def test_balanced_accuracy_is_the_mean_over_classes_that_have_images():
    assert balanced_accuracy(LABELS, PROBABILITIES) == pytest.approx((2 / 3 + 0) / 2)


def test_calibration_error_is_the_mean_gap_between_confidence_and_accuracy_of_the_bins():
    # Four images in four bins of width 1/15: gaps 0.1, 0.2, 0.6, 0.7.
    assert calibration_error(LABELS, PROBABILITIES) == pytest.approx((0.1 + 0.2 + 0.6 + 0.7) / 4)


def test_a_perfect_model_is_balanced_and_calibrated():
    perfect = torch.nn.functional.one_hot(LABELS, 3).float()
    assert computed(LABELS, perfect) == {"balanced_accuracy": 1.0, "calibration_error": 0.0}


def test_a_value_is_written_as_a_percentage_and_a_missing_one_as_a_dash():
    assert METRICS[0].text(0.123456) == "12.3 %"
    assert METRICS[0].text(None) == "–"

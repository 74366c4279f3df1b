"""Validate the feature moments of an upload, which are not trusted any more than its weights.

A client can still send the moments of features that none of its images has. The checks limit what it gains: its moments
are those of some set of as many features as it reports images, and none of these features is longer than the last norm
of the common initialisation allows.

Letters: C classes, D embedding; n images, n_c of class c, s_c the sum of their features, M the sum of x x^T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedmitr_flwr.federation.uploads.layout import Layout
from fedmitr_flwr.federation.uploads.records import decode_state
from fedmitr_flwr.federation.uploads.validation import UploadRefused
from fedmitr_flwr.models.moments import Moments

_ROUNDING = 2.0**-22
"""Largest rounding error of the scatter in fp32 moments, relative to the trace of M.

Rounding to fp32 changes each entry of M by at most 2^-24 of itself, and each s_c s_c^T / n_c by twice as much. The
spectral norm of the error is therefore at most 3 * 2^-24 times the trace.
"""
# Features are computed in fp32, so their length may exceed the bound slightly.
_LENGTH_MARGIN = 1.01


def moments_layout(reference: Mapping[str, Tensor]) -> Layout:
    """Return the layout of moments for a model with one head; floating-point tensors must be fp32.

    Parameters
    ----------
    reference
        State dict of the common initialisation.
    """
    classes, width = reference["head.weight"].shape
    return Layout.of(Moments.blank(classes, width).tensors(), frozenset({torch.float32}))


def decode_moments(record: ArrayRecord, layout: Layout) -> Moments:
    """Convert a received record into moments of the expected shapes, without a check of their values.

    Raises
    ------
    UploadRefused
        As `records.decode_state`.
    """
    try:
        return Moments(**decode_state(record, layout, "fp32"))
    except UploadRefused as refusal:
        raise UploadRefused(f"moments: {refusal}") from None


def check_moments(moments: Moments, num_examples: int, histogram: Sequence[int] | None, longest: float) -> None:
    """Check that moments can be those of a client's features.

    Parameters
    ----------
    moments
        Moments of the right shapes and dtypes.
    num_examples
        The client's validated number of images.
    histogram
        Its validated class counts; None if it does not share them.
    longest
        Upper bound on the L2 norm of a feature, from `longest_feature`.

    Raises
    ------
    UploadRefused
        If a value is not finite; the counts are negative, do not sum to the number of images or differ from the
        histogram; a class without images has a sum; or the products are not those of features with these sums: the
        trace of M is below ``sum_c |s_c|^2 / n_c``, the scatter ``M - sum_c s_c s_c^T / n_c`` has a negative eigenvalue
        beyond rounding, or the trace exceeds n times the square of `longest`.
    """
    counts, sums = moments.counts, moments.sums
    for name in ("sums", "products"):
        if not bool(torch.isfinite(getattr(moments, name)).all()):
            raise UploadRefused(f"moments: {name} hold NaN or Inf")
    if bool((counts < 0).any()):
        raise UploadRefused(f"moments: a count is {int(counts.min())}, which is negative")
    # A count above the number of images is refused first, because the sum of larger numbers could overflow.
    if int(counts.max()) > num_examples or int(counts.sum()) != num_examples:
        raise UploadRefused(f"moments: counts do not sum to num-examples, which is {num_examples}")
    if histogram is not None and counts.tolist() != list(histogram):
        raise UploadRefused("moments: counts differ from the label histogram")
    if bool((sums[counts == 0] != 0).any()):
        raise UploadRefused("moments: a class without images has a sum that is not zero")
    second = moments.second()
    trace = float(second.trace())
    rounding = _ROUNDING * abs(trace) + torch.finfo(torch.float64).tiny
    scaled = sums.double() / counts.clamp_min(1).double().sqrt()[:, None]
    if trace < float(scaled.square().sum()) - rounding:
        raise UploadRefused("moments: products are smaller than the sums of the classes allow")
    if trace > num_examples * (_LENGTH_MARGIN * longest) ** 2:
        length = math.sqrt(trace / num_examples)
        raise UploadRefused(
            f"moments: the mean length of the features is {length:.4g}; this model's are at most {longest:.4g}"
        )
    # A Cholesky factor exists exactly if all eigenvalues are positive, and takes a tenth of the time of eigenvalues.
    scatter = second - scaled.T @ scaled + rounding * torch.eye(len(second), dtype=torch.float64)
    if int(torch.linalg.cholesky_ex(scatter).info) != 0:
        raise UploadRefused("moments: products are not those of features (negative scatter within the classes)")


def longest_feature(reference: Mapping[str, Tensor]) -> float:
    """Return an upper bound on the L2 norm of what the classifier head reads; infinity if there is no norm before it.

    LayerNorm and RMSNorm without their affine map return vectors of at most the length ``sqrt(D)``, so the length after
    it is at most ``sqrt(D) max |w| + |b|``.

    Parameters
    ----------
    reference
        State dict of the common initialisation.
    """
    for norm in ("fc_norm", "norm"):
        weight = reference.get(f"{norm}.weight")
        if weight is not None:
            bias = reference.get(f"{norm}.bias", torch.zeros(1))
            return math.sqrt(weight.numel()) * float(weight.abs().max()) + float(bias.norm())
    return math.inf

"""Dense inversion with distillation: DeepInversion (Yin et al. 2020, arXiv 1912.08795) of the ensemble.

Every patch of every image is optimised in every iteration, and the whole image is distilled; nothing is split or
relabeled. Departures: a ViT has no batch normalisation, so the term on its statistics is absent; the remaining
constants (`inversion.*`) are the run's own, so that sparse and dense are compared at the same ones.
"""

from __future__ import annotations

from fedmitr_flwr.pipeline.methods.common import FedMITRWith
from fedmitr_flwr.settings import RunConfigValue

_DENSE: dict[str, RunConfigValue] = {
    "inversion.method": "sparse",
    "inversion.stops": "",
    "inversion.fractions": "",
    "relabel.labels": "off",
    "distill.low-weight": 0.0,
    "distill.ce-on": "full",
}

dense_inversion = FedMITRWith(_DENSE)
"""Distil KL to the ensemble and cross-entropy with the pseudo-label. See `pipeline.run_pipeline`."""

dense_inversion_kl = FedMITRWith({**_DENSE, "distill.ce-weight": 0.0})
"""Distil KL to the ensemble alone. See `pipeline.run_pipeline`."""

"""Dense inversion with distillation: DeepInversion (Yin et al. 2020, arXiv 1912.08795) of the ensemble.

Every patch of every image is optimised in every iteration. The student is trained on whole images; there is no density
split and no relabeling. Departures: the term on the statistics of batch normalisation is left out, because a ViT has no
batch normalisation; the other constants (`inversion.*`) are those of the run, so that sparse and dense inversion are
compared with the same ones.
"""

from __future__ import annotations

from fedmitr_flwr.pipeline.methods.common import Method
from fedmitr_flwr.pipeline.methods.fedmitr import inverted_images, run_pipeline
from fedmitr_flwr.settings import RunConfigValue

_DENSE: dict[str, RunConfigValue] = {
    "inversion.method": "sparse",
    "inversion.stops": "",
    "inversion.fractions": "",
    "relabel.labels": "off",
    "distill.low-weight": 0.0,
    "distill.ce-on": "full",
}

DENSE_INVERSION = Method(run_pipeline, "dense model inversion and distillation", inverted_images, _DENSE)
"""Distils by KL to the ensemble and by cross-entropy with the pseudo-label."""

DENSE_INVERSION_KL = Method(
    run_pipeline,
    "dense model inversion and distillation with the KL loss alone",
    inverted_images,
    {**_DENSE, "distill.ce-weight": 0.0},
)
"""Distils by KL to the ensemble alone."""

"""What happens to a client's upload between training and sending: one function a step, in order.

A step sees the whole upload and returns the one that goes on. It is the place for whatever limits what an upload gives
away, such as clipping or noise. A step that the settings do not ask for returns the upload unchanged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from fedmitr_flwr.training.upload import ClientTask, ClientUpload


class UploadStep(Protocol):
    """A step between training and sending."""

    def __call__(self, upload: ClientUpload, task: ClientTask, generator: torch.Generator) -> ClientUpload:
        """Return the upload that goes on.

        Parameters
        ----------
        upload
            After the steps before this one.
        task
            Settings, and the weights that training started from.
        generator
            CPU generator, seeded for this client and round.
        """


def withhold_histogram(upload: ClientUpload, task: ClientTask, generator: torch.Generator) -> ClientUpload:
    """Remove the label histogram unless `train.share-label-histogram` is set."""
    return upload if task.settings.train.share_label_histogram else replace(upload, histogram=None)


UPLOAD_STEPS: tuple[UploadStep, ...] = (withhold_histogram,)
"""In the order in which they run."""


def prepare_upload(upload: ClientUpload, task: ClientTask, seed: int) -> ClientUpload:
    """Run all steps."""
    generator = torch.Generator().manual_seed(seed)
    for step in UPLOAD_STEPS:
        upload = step(upload, task, generator)
    return upload

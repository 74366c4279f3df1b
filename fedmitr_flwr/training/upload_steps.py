"""Steps that process a client's upload between training and sending.

A step is a function that gets the whole upload and returns it, changed or not. Methods that limit what an upload
reveals, such as clipping or noise, belong here. A step that the settings do not ask for returns the upload unchanged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from fedmitr_flwr.training.upload import ClientTask, ClientUpload


class UploadStep(Protocol):
    """Signature of a step between training and sending."""

    def __call__(self, upload: ClientUpload, task: ClientTask, generator: torch.Generator) -> ClientUpload:
        """Return the upload for the next step, or for sending if this step is the last.

        Parameters
        ----------
        upload
            The upload as the previous step returned it.
        task
            Holds the settings and the weights from which training started.
        generator
            CPU generator, seeded for this client and round.
        """


def withhold_histogram(upload: ClientUpload, task: ClientTask, generator: torch.Generator) -> ClientUpload:
    """Remove the label histogram unless `train.share-label-histogram` is set."""
    return upload if task.settings.train.share_label_histogram else replace(upload, histogram=None)


UPLOAD_STEPS: tuple[UploadStep, ...] = (withhold_histogram,)
"""The steps in the order in which they run."""


def prepare_upload(upload: ClientUpload, task: ClientTask, seed: int) -> ClientUpload:
    """Run all steps on an upload, with a generator seeded with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    for step in UPLOAD_STEPS:
        upload = step(upload, task, generator)
    return upload

"""Store of client uploads: validate each one, write it atomically as safetensors, list them in a fixed order.

A one-shot exchange cannot be repeated, and uploads come from machines outside our control, so no part of an upload is
trusted. It is accepted if its tensors have exactly the names and shapes of the common model, its values are finite and
its numbers are plausible. Otherwise it is refused with the reason.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.linalg import vector_norm

from fedmitr_flwr.federation.uploads.layout import Layout
from fedmitr_flwr.federation.uploads.moments import check_moments, longest_feature, moments_layout
from fedmitr_flwr.federation.uploads.validation import (
    UploadRefused,
    check_count,
    check_histogram,
    check_name,
    check_number,
    file_stem,
    natural_key,
)
from fedmitr_flwr.models.moments import Moments
from fedmitr_flwr.models.trainable import CompletedState, TrainedPart
from fedmitr_flwr.runs.tensors import StoredState, checksum, read_tensors, write_tensors
from fedmitr_flwr.training.reported import REPORTED

log = logging.getLogger("fedmitr.collection")

# End of the name of a file with moments. The names of files with weights have no dot before ".safetensors".
_MOMENTS = ".moments.safetensors"


class OtherInitialisationError(RuntimeError):
    """The uploads of a resumed run were trained from another initialisation than the run has now."""


@dataclass(frozen=True)
class StoredUpload:
    """An accepted upload.

    Attributes
    ----------
    client
        Name of the client in this run: its site or partition, not Flower's random node id.
    num_examples
        Number of the client's training images, at least 1.
    histogram
        Number of training images in each of the C classes; None if the client did not share it.
    numbers
        Further reported numbers by name; see `reported.REPORTED`.
    path
        The safetensors file, in the number format of the upload.
    checksum
        Checksum over the tensors and the reported numbers; see `runs.tensors.checksum`.
    moments
        Checksum over the client's feature moments, which are in a file of their own beside `path`; None if the run does
        not ask for moments.
    """

    client: str
    num_examples: int
    histogram: tuple[int, ...] | None
    numbers: Mapping[str, float]
    path: Path
    checksum: str
    moments: str | None = None

    @property
    def megabytes(self) -> float:
        """Size of the upload in MB (10^6 bytes), weights and moments, as it is stored."""
        files = [self.path, *([_beside(self.path)] if self.moments else [])]
        return sum(file.stat().st_size for file in files) / 1e6


class UploadStore:
    """Uploads of one round in one directory.

    Parameters
    ----------
    directory
        Directory of the files; it is made if it is missing.
    reference
        State dict of the common initialisation. Floating-point tensors of an upload may be fp32, fp16 or bf16; other
        dtypes must be equal.
    num_classes
        C, the length of a histogram.
    needs_histogram
        Whether to refuse uploads without a label histogram.
    max_update_norm
        Refuse weights whose L2 distance from the reference exceeds this many times the norm of the reference, or this
        number if that norm is below 1; 0: no limit.
    needs_moments
        Whether to refuse uploads without feature moments. If False, no moments are stored.
    part
        What clients train. Every upload must have exactly the tensors of `TrainedPart.uploaded`; the store completes
        it from the reference when it is read. None: all weights.

    Attributes
    ----------
    initial
        Checksum of the reference.
    """

    def __init__(
        self,
        directory: Path,
        reference: Mapping[str, Tensor],
        num_classes: int,
        *,
        needs_histogram: bool = False,
        max_update_norm: float = 0.0,
        needs_moments: bool = False,
        part: TrainedPart | None = None,
    ) -> None:
        self.directory = directory
        self.reference = reference
        self.max_update_norm = max_update_norm
        self.num_classes = num_classes
        self.needs_histogram = needs_histogram
        self.part = part or TrainedPart(tuple(reference))
        self.initial = checksum(reference)
        self.layout = Layout.of(self.part.uploaded(reference))
        self.moments_layout = moments_layout(reference) if needs_moments else None
        floating = {key: value for key, value in reference.items() if value.is_floating_point()}
        self._start = math.sqrt(sum(float(vector_norm(value)) ** 2 for value in floating.values()))
        self._floating = {key: floating[key] for key in self.part.changed if key in floating}
        self._max_distance = max_update_norm * max(1.0, self._start)
        # Buffer for all differences: new memory pages for 23 MB cost more time than the subtraction.
        self._difference = torch.empty(max((value.numel() for value in self._floating.values()), default=0))
        self._uploads: dict[str, StoredUpload] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def check_client(self, client: object) -> str:
        """Return the client's name.

        Raises
        ------
        UploadRefused
            If the name is not 1 to 128 printable characters, or an upload with this name was accepted before.
        """
        name = check_name(client)
        if name in self._uploads:
            raise UploadRefused(f"second upload of client {name}")
        return name

    def accept(
        self,
        client: object,
        state: Mapping[str, Tensor],
        *,
        num_examples: object,
        numbers: Mapping[str, object],
        histogram: object = None,
        moments: Moments | None = None,
    ) -> StoredUpload:
        """Validate one upload, write it to disk and add it to the list.

        Parameters
        ----------
        client
            The client's name.
        state
            The client's tensors; no reference to them is kept.
        num_examples, numbers, histogram
            Reported numbers; of any type, because they are not trusted.
        moments
            The client's feature moments, of the shapes and dtypes of `moments_layout`; their values are not trusted.
            They are dropped if the run does not ask for moments.

        Raises
        ------
        UploadRefused
            If a check fails; nothing is written.
        OSError
            If writing fails; the list is unchanged.
        """
        name = self.check_client(client)
        self.layout.check(Layout.of(state))
        count = check_count("num-examples", num_examples, 1)
        counts = check_histogram(histogram, count, self.num_classes, needed=self.needs_histogram)
        checked = {
            number.name: check_number(number.name, numbers.get(number.name), number.least, number.most)
            for number in REPORTED
        }
        moments = self._checked_moments(moments, count, counts)
        self._check_values(state)
        path = self.directory / f"{file_stem(name)}.safetensors"
        sealed = None if moments is None else checksum(moments.tensors())
        upload = StoredUpload(name, count, counts, checked, path, "", sealed)
        upload = replace(upload, checksum=self._write(upload, state, moments))
        self._uploads[name] = upload
        return upload

    def recover(self) -> list[StoredUpload]:
        """Load the uploads that an earlier process accepted into this directory.

        A file that is incomplete or has changed since is skipped with a warning; its client is asked again.

        Returns
        -------
        list[StoredUpload]
            All uploads, in the order of `uploads`.

        Raises
        ------
        OtherInitialisationError
            If an upload was trained from other weights than the reference.
        """
        for path in sorted(self.directory.glob("*.safetensors")):
            if path.name.endswith(_MOMENTS):
                continue
            try:
                upload = self._read(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("\t├──! %s is not used: %s", path, error)
                continue
            self._uploads[upload.client] = upload
        return self.uploads()

    def _read(self, path: Path) -> StoredUpload:
        state, about = read_tensors(path)
        if about.get("initial", self.initial) != self.initial:
            raise OtherInitialisationError(
                f"{path} was trained from another initialisation than this process has; restore the initial weights "
                "from a copy or start a new run"
            )
        counts = json.loads(about["histogram"])
        upload = StoredUpload(
            about["client"],
            int(about["num-examples"]),
            None if counts is None else tuple(counts),
            {number.name: float(about[number.name]) for number in REPORTED},
            path,
            about["checksum"],
            about.get("moments") if self.moments_layout else None,
        )
        if path.stem != file_stem(upload.client):
            raise ValueError(f"its file name does not belong to its client {upload.client}")
        self.layout.check(Layout.of(state))
        if self.moments_layout:
            moments = self.moments(upload)
            if moments is None:
                raise ValueError("it has no feature moments, which this run needs")
            self.moments_layout.check(Layout.of(moments.tensors()))
        return upload

    def uploads(self) -> list[StoredUpload]:
        """Return the accepted uploads sorted by client name, so that the order of arrival has no effect."""
        return sorted(self._uploads.values(), key=lambda upload: natural_key(upload.client))

    def load(self, upload: StoredUpload) -> dict[str, Tensor]:
        """Read a client's full weights, floating-point ones as fp32; tensors that it did not train are the reference's.

        Raises
        ------
        ValueError
            If the file has changed since it was accepted.
        """
        return dict(self._completed(self._stored(upload)))

    def _stored(self, upload: StoredUpload) -> dict[str, Tensor]:
        """Read the tensors of an upload's file, and check that they have not changed."""
        state, about = read_tensors(upload.path)
        if about.get("checksum") != upload.checksum:
            raise ValueError(f"{upload.path} has changed since the upload of {upload.client} was accepted")
        return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}

    def moments(self, upload: StoredUpload) -> Moments | None:
        """Read an upload's feature moments; None if the run does not ask for them.

        Raises
        ------
        ValueError
            If the file has changed since it was accepted.
        OSError
            If the file is missing.
        """
        if upload.moments is None:
            return None
        path = _beside(upload.path)
        found, _ = read_tensors(path)
        if checksum(found) != upload.moments:
            raise ValueError(f"{path} has changed since the upload of {upload.client} was accepted")
        return Moments(**found)

    def _checked_moments(
        self, moments: Moments | None, count: int, histogram: tuple[int, ...] | None
    ) -> Moments | None:
        """Return valid moments; None if the run does not ask for them."""
        if self.moments_layout is None:
            return None
        if moments is None:
            raise UploadRefused("has no feature moments, which this run needs")
        check_moments(moments, count, histogram, longest_feature(self.reference))
        return moments

    def _completed(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return state if self.part.whole else CompletedState(self.part, state, self.reference)

    def _check_values(self, upload: Mapping[str, Tensor]) -> None:
        """Refuse NaN, Inf, and weights further from the common initialisation than `max_update_norm` allows."""
        for key in self.part.adapters:
            if not torch.isfinite(upload[key]).all():
                raise UploadRefused(f"{key} holds NaN or Inf")
        state = self._completed(upload)
        # Fast check: |w| + |w0| bounds the distance, shows NaN and Inf, and costs a quarter of a norm of differences.
        size = math.sqrt(sum(float(vector_norm(state[key], dtype=torch.float32)) ** 2 for key in self._floating))
        if size + self._start <= (self._max_distance if self.max_update_norm else math.inf) and math.isfinite(size):
            return
        update = 0.0
        for key, expected in self._floating.items():
            difference = self._difference[: expected.numel()].view(expected.shape)
            norm = float(vector_norm(torch.sub(state[key], expected, out=difference)))
            # The norm also overflows for finite values near fp32's maximum; those are refused as too distant below.
            if not math.isfinite(norm) and not torch.isfinite(state[key]).all():
                raise UploadRefused(f"{key} holds NaN or Inf")
            update += norm**2
        distance = math.sqrt(update)
        if self.max_update_norm and not distance <= self._max_distance:
            raise UploadRefused(
                f"lies {distance:.4g} from the common initialisation, above run.max-update-norm = "
                f"{self.max_update_norm:g} times its norm ({self._max_distance:.4g})"
            )

    def open(self, upload: StoredUpload) -> Mapping[str, Tensor]:
        """Return the full weights as a mapping that reads tensors of the file at access; it is checked once, here.

        Tensors that the client did not train are those of the reference, so that all clients share them in memory.

        Raises
        ------
        ValueError
            If the file has changed since it was accepted.
        """
        return self._completed(StoredState(upload.path, tuple(self._stored(upload))))

    def _write(self, upload: StoredUpload, state: Mapping[str, Tensor], moments: Moments | None) -> str:
        """Write an upload and return the checksum of the file of weights.

        The moments are written first: an upload counts once its file of weights is there.
        """
        metadata = {
            "client": upload.client,
            "num-examples": str(upload.num_examples),
            "histogram": json.dumps(upload.histogram),
            **{name: repr(value) for name, value in upload.numbers.items()},
            "initial": self.initial,
        }
        if moments is not None and upload.moments is not None:
            metadata["moments"] = upload.moments
            write_tensors(_beside(upload.path), moments.tensors(), {"client": upload.client})
        return write_tensors(upload.path, state, metadata)


def _beside(path: Path) -> Path:
    """Return the file of moments that belongs to a file of weights."""
    return path.with_name(path.stem + _MOMENTS)

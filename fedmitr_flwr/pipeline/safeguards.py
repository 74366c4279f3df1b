"""What protects a run from single clients before the method starts, and the warnings about those that dominate it.

Letters: K clients, C classes.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fedmitr_flwr.data.classes import listed
from fedmitr_flwr.ensemble.bounds import FEWEST, BoundedState, dominant, update_norms, update_scales
from fedmitr_flwr.pipeline.inputs import PipelineInputs
from fedmitr_flwr.pipeline.steps import evidence_of


def bounded_uploads(inputs: PipelineInputs) -> tuple[PipelineInputs, tuple[str, ...]]:
    """Shorten or leave out the updates that are too long, by `run.update-limit` and `run.update-limit-action`.

    Returns
    -------
    inputs
        The same object if no update is too long.
    warnings
        One sentence for each upload that was changed or left out, and for each claimed number of images that counts
        less than it says.

    Raises
    ------
    ValueError
        If no upload is left.
    """
    run, uploads, warnings = inputs.settings.run, list(inputs.uploads), []
    scales = update_scales(update_norms(inputs.states, inputs.initial), run.update_limit)
    for k in (scales.min(1).values < 1).nonzero().squeeze(1).tolist():
        what = f"the update of {inputs.named(k)} is more than {run.update_limit:g} times as long as the median update"
        if run.update_limit_action == "clip":
            uploads[k] = replace(uploads[k], state=BoundedState(uploads[k].state, inputs.initial, scales[k]))
            warnings.append(f"{what}, in all or in one tensor. It was shortened (run.update-limit).")
        else:
            warnings.append(f"{what}, in all or in one tensor. The upload was left out (run.update-limit).")
    if run.update_limit_action == "refuse":
        uploads = [upload for upload, scale in zip(uploads, scales, strict=True) if bool((scale == 1).all())]
        if not uploads:
            raise ValueError("no upload is left: all updates are longer than run.update-limit allows")
    for k, (claimed, counted) in enumerate(zip(_claims(inputs), inputs.num_examples.tolist(), strict=True)):
        if counted < claimed:
            much = f"{inputs.named(k)} claims {claimed:,.0f} images, far more than the others"
            warnings.append(f"{much}. It counts as {counted:,.0f}.")
    unchanged = bool((scales == 1).all())
    return (inputs if unchanged else replace(inputs, uploads=uploads)), tuple(warnings)


def vote_warnings(inputs: PipelineInputs, weights: Tensor) -> tuple[str, ...]:
    """Name the clients with more than half of FedAvg's weight, or of a class's vote that others know too.

    Parameters
    ----------
    weights
        ``(K, C)`` of the ensemble.
    """
    if len(inputs.uploads) < FEWEST:
        return ()
    share = inputs.num_examples / inputs.num_examples.sum()
    names = inputs.spec.class_names
    found = [
        f"{inputs.named(k)} has {100 * share[k]:.0f} % of the weight in the average of the uploads."
        for k in (share > 0.5).nonzero().squeeze(1).tolist()
    ]
    for k, classes in dominant(weights.cpu(), evidence_of(inputs)).items():
        shown = listed([names[c] for c in classes], 6)
        found.append(f"{inputs.named(k)} has more than half of the ensemble's weight for {shown}.")
    return tuple(found)


def _claims(inputs: PipelineInputs) -> list[float]:
    return [float(upload.num_examples) for upload in inputs.uploads]

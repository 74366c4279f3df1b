"""The weights from which a student can start, `distill.start`. Some of them are also the models of baselines."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.ensemble.merging import ace_merging, task_arithmetic, wudi_merging
from fedmitr_flwr.pipeline.inputs import PipelineInputs
from fedmitr_flwr.pipeline.shared_moments import expert_state, pooled_moments

State = dict[str, Tensor]


def student_start(inputs: PipelineInputs, ensemble: Ensemble) -> State:
    """Return the student's starting weights by `distill.start`, on the CPU."""
    return STARTS[inputs.settings.distill.start](inputs, ensemble)


def _initial(inputs: PipelineInputs, ensemble: Ensemble) -> State:
    return dict(inputs.initial)


def _average(inputs: PipelineInputs, ensemble: Ensemble) -> State:
    return inputs.average()


def _merged(inputs: PipelineInputs, ensemble: Ensemble) -> State:
    return inputs.merged(ensemble.weights.cpu())


def _task_arithmetic(inputs: PipelineInputs, ensemble: Ensemble) -> State:
    scale = inputs.settings.distill.task_scale
    return task_arithmetic(inputs.initial, inputs.states, ensemble.weights.cpu(), scale)


def _ace_merging(inputs: PipelineInputs, ensemble: Ensemble) -> State:
    return ace_merging(inputs.initial, inputs.states, ensemble.weights.cpu(), inputs.device)


def _wudi_merging(inputs: PipelineInputs, ensemble: Ensemble) -> State:
    return wudi_merging(inputs.initial, inputs.states, ensemble.weights.cpu(), inputs.device)


def _moments(inputs: PipelineInputs, ensemble: Ensemble) -> State:
    return expert_state(inputs, pooled_moments(inputs))


STARTS: dict[str, Callable[[PipelineInputs, Ensemble], State]] = {
    "fedavg": _average,
    "initial": _initial,
    "merged": _merged,
    "task-arithmetic": _task_arithmetic,
    "ace-merging": _ace_merging,
    "wudi-merging": _wudi_merging,
    "moments": _moments,
}
"""The starts by `distill.start`, in the order of `settings.choices.StudentStart`."""

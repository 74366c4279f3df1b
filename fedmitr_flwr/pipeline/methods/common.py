"""The description of a method of `run.method`, and a function that several baselines use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.pipeline.inputs import Pipeline, PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.safeguards import bounded_uploads, vote_warnings
from fedmitr_flwr.pipeline.shared_moments import report_moments
from fedmitr_flwr.pipeline.steps import make_ensemble
from fedmitr_flwr.settings import RunConfigValue, Settings


@dataclass(frozen=True)
class Method:
    """A method that makes one global model from the uploads, with all that the rest of the program needs to know.

    Attributes
    ----------
    pipeline
        Function that makes the model.
    title
        Name of the method in the model card and the report; Markdown.
    server_part
        Function of the resolved settings that returns one sentence on what the server did with the uploads.
    changes
        Settings that the method fixes and that override the run-config, such as ``{"distill.labels": "hard"}``.
    distils
        Whether a student is trained. False for methods that only average.
    inverts
        Whether images are inverted from the teachers.
    generates
        Whether a generator is trained. Its FLOPs are not counted.
    """

    pipeline: Pipeline
    title: str
    server_part: Callable[[Settings], str]
    changes: Mapping[str, RunConfigValue] = field(default_factory=dict)
    distils: bool = True
    inverts: bool = True
    generates: bool = False

    def resolve(self, settings: Settings) -> Settings:
        """Return the settings, with the values that the method fixes."""
        return settings.replace(**self.changes) if self.changes else settings

    def __call__(self, inputs: PipelineInputs) -> PipelineResult:
        """Run the method with its resolved settings on bounded uploads; see `fedmitr.run_pipeline`."""
        resolved = replace(inputs, settings=self.resolve(inputs.settings))
        bounded, warnings = bounded_uploads(resolved)
        for warning in warnings:
            inputs.observer.event("ensemble", warning=warning)
        if bounded.settings.train.share_moments:
            report_moments(bounded)
        result = self.pipeline(bounded)
        dominance = vote_warnings(bounded, result.ensemble.weights)
        for warning in dominance:
            inputs.observer.event("ensemble", warning=warning)
        return replace(result, warnings=(*result.warnings, *warnings, *dominance))


def the_ensemble(settings: Settings) -> str:
    """Return the name of the ensemble for sentences of the model card."""
    more = {"moments": " and a linear discriminant of the clients' feature moments", "merged": " and the merged model"}
    return f"the ensemble of uploads{more.get(settings.expert, '')}"


def untrained_result(inputs: PipelineInputs, ensemble: Ensemble | None = None) -> PipelineResult:
    """Return a result whose global model is the one-shot FedAvg of the uploads, with the ensemble.

    Parameters
    ----------
    ensemble
        The ensemble of the result; None: made from the uploads.
    """
    ensemble = ensemble or make_ensemble(inputs)[0]
    average = inputs.average()
    return PipelineResult(dict(average), average, ensemble, None, None, None, {})

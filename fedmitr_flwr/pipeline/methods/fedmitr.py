"""FedMITR: run the four stages in order, from the uploads to one global ViT, without any data."""

from __future__ import annotations

import torch

from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.pipeline.diagnostics import diagnose
from fedmitr_flwr.pipeline.hard_images import HardImages
from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult, StageContext
from fedmitr_flwr.pipeline.methods.common import Method, the_ensemble
from fedmitr_flwr.pipeline.starts import student_start
from fedmitr_flwr.pipeline.steps import distilled, freeze_student, invert_all, make_ensemble, split_and_relabel
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.stages.distillation.pool import make_pool


def run_pipeline(inputs: PipelineInputs) -> PipelineResult:
    """Run FedMITR on validated uploads.

    Raises
    ------
    SettingsError, ValueError
        If the weighting needs histograms that clients withheld.
    InversionDivergedError, RuntimeError
        If a loss is not finite.
    """
    settings, observer, checkpoints = inputs.settings, inputs.observer, inputs.checkpoints
    ensemble, known = make_ensemble(inputs)
    model = build_model(settings.model, inputs.spec)
    context = StageContext(ensemble, PatchGrid.of(model, inputs.spec), settings)
    with observer.stage("invert"):
        synthetic = invert_all(context, known, inputs)
        found = diagnose(context.inversion, synthetic)
        observer.event("diagnostics", **found.as_dict())
        for warning in found.warnings():
            observer.event("diagnostics", warning=warning)
    with observer.stage("relabel"):
        made = split_and_relabel(context, synthetic, observer)
        targets = made.low_targets
        observer.event(
            "relabel",
            high_density=float(made.split.high.float().mean()),
            ensemble_agrees=float((targets.probabilities.argmax(1) == synthetic.labels)[targets.present].float().mean())
            if bool(targets.present.any())
            else 0.0,
        )
    average = inputs.average()
    state = checkpoints.model() if checkpoints is not None else None
    if state is None:
        with observer.stage("distill"):
            model.load_state_dict(student_start(inputs, ensemble))
            trunk = freeze_student(inputs, ensemble, model, settings.distill)
            generator = torch.Generator().manual_seed(inputs.seed)
            pool = make_pool(ensemble, made, context.grid, settings.distill, generator=generator, trunk=trunk)
            observer.event("distill", labelled_images=len(pool))
            seed = inputs.seed
            harder = HardImages(
                context, model, known, pool, seed=seed, generator=generator, observer=observer, trunk=trunk
            )
            grow = harder if settings.distill.adversarial_rounds > 0 else None
            state = distilled(inputs, ensemble, model, pool, settings.distill, generator, grow)
        if checkpoints is not None:
            checkpoints.save_model(state)
    return PipelineResult(state, average, ensemble, synthetic, made.split, found, dict(observer.seconds))


def inverted_images(settings: Settings) -> str:
    """Return the sentence of the model card on what a method with inversion did with the uploads."""
    noise = f" and on random images ({settings.distill.noise:g} for each of them)" if settings.distill.noise > 0 else ""
    return (
        f"It inverted {the_ensemble(settings)} into {settings.inversion.images} synthetic images and distilled the "
        f"ensemble into this model on these images{noise}."
    )


CITATION = "FedMITR ([arXiv 2605.10748](https://arxiv.org/abs/2605.10748))"
FEDMITR = Method(run_pipeline, CITATION, inverted_images)

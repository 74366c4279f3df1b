"""Write the model card of a run's model: ``model/README.md``, with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import json
from pathlib import Path

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.federation.quorum import ClientCounts
from fedmitr_flwr.pipeline.methods import method_of
from fedmitr_flwr.results.evaluate import Evaluation
from fedmitr_flwr.results.metrics import METRICS, MODELS
from fedmitr_flwr.runs.atomic import atomic_path
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.training.reported import REPORTED
from fedmitr_flwr.version import __version__

CARD = "README.md"


def write_model_card(
    folder: Path, settings: Settings, spec: ImageSpec, evaluation: Evaluation | None, clients: ClientCounts
) -> None:
    """Write the model card.

    Parameters
    ----------
    folder
        Folder ``model/`` of the run.
    settings, spec
        Settings and image specification of the run.
    evaluation
        Evaluation of the last round; None: the card says that no accuracy was measured.
    clients
        Client counts of the last round.
    """
    with atomic_path(folder / CARD) as temporary:
        temporary.write_text(model_card(settings, spec, evaluation, clients), "utf-8")


def model_card(settings: Settings, spec: ImageSpec, evaluation: Evaluation | None, clients: ClientCounts) -> str:
    """Return the text of the card: how the model was made, how to use it, its accuracy and its limits."""
    method = method_of(settings)
    name = f"{settings.model.name} trained by one-shot federated learning on {settings.data.source}"
    reported = ", ".join(number.title for number in REPORTED)
    shared = _shared(settings)
    exchange = "once" if settings.run.rounds == 1 else f"{settings.run.rounds} times"
    shape = f"B, {spec.channels}, {spec.image_size}, {spec.image_size}"
    weights = "the weights"
    if settings.train.trainable != "all":
        weights += f" that were trained (`train.trainable = {settings.train.trainable}`)"
    init, start = settings.model.init, "All clients started from the same initialisation"
    sections = [
        _front_matter(settings, evaluation, name),
        f"# {name}\n",
        f"This is a Vision Transformer for {spec.num_classes} classes, made with fedmitr-flwr {__version__}. "
        f"The method is {method.title}.\n",
        "## How it was made\n",
        f"Each of {clients.accepted} clients trained a model on its own images and uploaded its weights {exchange}. "
        f"{start} (`model.init = {init}`). An upload contains {weights}, the number of images, {reported}, "
        f"{shared}. The server received no image of a client. {method.server_part(settings)} "
        f"The seed of the run is {settings.run.seed}.\n",
        "## Use\n",
        '```python\nimport timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n```\n',
        f"FOLDER is the folder that contains this file. The input has the shape `({shape})`. Its pixels are scaled to "
        f"0..1 and normalised with mean {_numbers(spec.mean)} and standard deviation {_numbers(spec.std)}. The classes "
        f"in the order of the outputs are {', '.join(spec.class_names)}.\n",
        "## Accuracy\n",
        _accuracy(settings, evaluation),
        "## Limits\n",
        "- The server made the model from the clients' models, without their images. The model is least accurate on "
        "classes that few clients have.\n"
        "- The accuracies are those of one run with one partition and one seed, on images from the same source as the "
        "clients' images. The accuracy on other images was not measured.\n"
        "- Model weights are not anonymous. The changes of a client's classifier head show which classes the client "
        "has, and inversion of a client's model produces images that show what the model responds to."
        f"{_MOMENTS_SHOW if settings.train.share_moments else ''}\n"
        "- This card states no licence, because the licence depends on the clients' data and on the initial weights.\n",
    ]
    return "\n".join(sections)


_MOMENTS_SHOW = (
    " The feature moments contain the exact number of a client's images of each class and their mean feature; the "
    "moments of a class with one image contain the feature of that image."
)


def _shared(settings: Settings) -> str:
    """Return what an upload contains beside weights and reported numbers."""
    histogram, moments = settings.train.share_label_histogram, settings.train.share_moments
    if not moments:
        return "and the label histogram" if histogram else "but no label counts"
    return ("the label histogram, " if histogram else "") + "and feature moments with the counts of each class"


def _front_matter(settings: Settings, evaluation: Evaluation | None, name: str) -> str:
    tags = ["federated-learning", "one-shot-federated-learning", "flower", "fedmitr", "timm", "vision-transformer"]
    lines = ["---", "library_name: timm", "pipeline_tag: image-classification", "tags:", *(f"- {tag}" for tag in tags)]
    if evaluation is not None:
        lines += [
            "metrics:",
            "- accuracy",
            "model-index:",
            f"- name: {json.dumps(name)}",
            "  results:",
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      name: {json.dumps(settings.data.source)}",
            f"      type: {json.dumps(_dataset_type(settings))}",
            f"      split: {settings.run.evaluate_on}",
            "    metrics:",
            "    - type: accuracy",
            f"      value: {evaluation.global_model:.4f}",
        ]
    return "\n".join([*lines, "---", ""])


def _dataset_type(settings: Settings) -> str:
    kind, _, rest = settings.data.source.partition(":")
    return rest if kind == "hub" else kind


def _accuracy(settings: Settings, evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "The accuracy was not measured (`run.evaluate-on = none`).\n"
    names = {**MODELS, "global": "**this model**"}
    images = f"{evaluation.num_images:,} {settings.run.evaluate_on} images"
    lines = [f"All models were evaluated on the same {images}. No client trained on these images.", ""]
    lines += ["| Model | Accuracy |", "|---|---|"]
    lines += [f"| {names[key]} | {100 * rate:.1f} % |" for key, rate in evaluation.accuracy().items()]
    own = evaluation.metrics.get("global", {})
    others = ", ".join(f"{metric.title} {metric.text(own[metric.name])}" for metric in METRICS if own)
    lines += ["", f"Other metrics of this model: {others}."] if others else []
    return "\n".join([*lines, ""])


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)

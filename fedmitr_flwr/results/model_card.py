"""The model card beside a run's model: ``model/README.md`` with the metadata that the Hub reads."""

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
from fedmitr_flwr.version import __version__

CARD = "README.md"


def write_model_card(
    folder: Path, settings: Settings, spec: ImageSpec, evaluation: Evaluation | None, clients: ClientCounts
) -> None:
    """Write the card.

    Parameters
    ----------
    folder
        ``model/`` of a run.
    settings, spec, evaluation, clients
        Of the run.
    """
    with atomic_path(folder / CARD) as temporary:
        temporary.write_text(model_card(settings, spec, evaluation, clients), "utf-8")


def model_card(settings: Settings, spec: ImageSpec, evaluation: Evaluation | None, clients: ClientCounts) -> str:
    """Return the card: how the model was made, what it reached, what it must not be taken for."""
    method = method_of(settings)
    name = f"{settings.model.name} trained by one-shot federated learning on {settings.data.source}"
    shared = "its label histogram too" if settings.train.share_label_histogram else "no label counts"
    exchange = "once" if settings.run.rounds == 1 else f"{settings.run.rounds} times"
    sections = [
        _front_matter(settings, evaluation, name),
        f"# {name}\n",
        f"A Vision Transformer for {spec.num_classes} classes, made with fedmitr-flwr {__version__} by "
        f"{method.title}.\n",
        "## How it was made\n",
        f"{clients.accepted} clients trained on their own images and uploaded their weights {exchange}. An upload "
        f"holds weights, the number of images, local loss and accuracy, and {shared}. The server saw no client's "
        f"image. {method.server_part(settings)} Start of all clients: `model.init = {settings.model.init}`; seed "
        f"{settings.run.seed}.\n",
        "## Use\n",
        '```python\nimport timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n```\n',
        f"FOLDER is this folder. Input: `(B, {spec.channels}, {spec.image_size}, {spec.image_size})`, pixels in 0..1, "
        f"normalised with mean {_numbers(spec.mean)} and standard deviation {_numbers(spec.std)}. Classes in order: "
        f"{', '.join(spec.class_names)}.\n",
        "## Accuracy\n",
        _accuracy(settings, evaluation),
        "## Limits\n",
        "- It knows the clients' images only through their models. Classes that few clients had are learnt worst.\n"
        "- The accuracies are those of one run, one partition and one seed, on images like the clients'; elsewhere "
        "nothing was measured.\n"
        "- Weights are not anonymous: how a classifier head moved shows which classes a client had, and images can be "
        "inverted from the clients' models that show what they respond to.\n"
        "- No licence is stated: it depends on the clients' data and on the weights that the clients started from.\n",
    ]
    return "\n".join(sections)


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
        return "Not measured: the server held no images (`run.evaluate-on = none`).\n"
    names = {**MODELS, "global": "**this model**"}
    rows = [f"| {names[key]} | {100 * rate:.1f} % |" for key, rate in evaluation.accuracy().items()]
    own = evaluation.metrics.get("global", {})
    rows += [f"| {metric.title} of this model | {metric.text(own[metric.name])} |" for metric in METRICS if own]
    head = (
        f"| on {evaluation.num_images:,} {settings.run.evaluate_on} images that no client trained on | |\n|---|---|\n"
    )
    table = "\n".join(rows)
    return f"{head}{table}\n"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)

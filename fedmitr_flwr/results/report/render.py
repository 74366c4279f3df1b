"""Render a run's files as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from fedmitr_flwr.results.finished_run import FinishedRun, load_run
from fedmitr_flwr.results.metrics import METRICS, MODELS
from fedmitr_flwr.results.report import charts, words
from fedmitr_flwr.results.report.clients import clients_section
from fedmitr_flwr.results.report.cost import cost_section
from fedmitr_flwr.results.report.curves import curves_of
from fedmitr_flwr.results.report.gallery import gallery_of
from fedmitr_flwr.results.report.images import matrix
from fedmitr_flwr.results.report.page import CSS, FOOT, HEAD, RUN
from fedmitr_flwr.runs.atomic import atomic_path
from fedmitr_flwr.runs.directory import REPORT
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.version import __version__

_LARGEST_TABLE = 30  # classes; a larger confusion matrix is drawn as an image


def write_run_report(path: Path) -> Path:
    """Write ``report.html`` into a run's directory and return its path.

    Raises
    ------
    SettingsError
        If the directory is not a run, or if this version cannot read it.
    """
    file = path / REPORT
    write_page(file, run_page(load_run(path, finished=False)))
    return file


def write_page(file: Path, page: str) -> None:
    """Write a page to a file, atomically."""
    with atomic_path(file) as temporary:
        temporary.write_text(page, "utf-8")


def render(body: str, title: str, **values: object) -> str:
    """Render a page: the template `body` with `values`, between the head with `title` and the foot."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(HEAD + body + FOOT)
    return page.render(title=title, css=Markup(CSS), version=__version__, **values)


def run_page(run: FinishedRun) -> str:
    """Return the report of one run as HTML."""
    evaluation = run.report.get("evaluation")
    counts = run.metrics.get("clients", {})
    names = run.report.get("class_names", run.config.get("class_names", []))
    settings: Mapping[str, Any] = run.config.get("settings", {})
    per_class = run.report.get("synthetic", {}).get("per_class", [1] * len(names))
    return render(
        RUN,
        f"{run.path.name} – fedmitr-flwr",
        run=run,
        verdict=words.verdict(counts, evaluation, int(settings.get("run.rounds", 1))),
        server_part=_server_part(run),
        facts=_facts(run),
        warnings=words.cautions(counts, evaluation, names, per_class) + list(run.report.get("warnings", [])),
        accuracy=_accuracy(evaluation, names) if evaluation else None,
        clients=clients_section(run, names),
        gallery=gallery_of(run, names),
        curves=curves_of(run),
        cost=cost_section(run),
        tables=_tables(run),
    )


def _server_part(run: FinishedRun) -> str:
    """Return what the server did with the uploads, as sentences; empty for a run of a version that did not store it."""
    stored = str(run.report.get("server_part", ""))
    return "The server " + stored.removeprefix("It ") if stored else ""


def accuracy_bars(evaluation: Mapping[str, Any]) -> list[charts.Bar]:
    """Return one bar for each model, the global model last.

    The interval of a bar is its 95 % interval. For the local models it is the range from the lowest to the highest
    accuracy.
    """
    rows = []
    for key, rate in evaluation["accuracy"].items():
        low, high = words.wilson(rate, evaluation["num_images"])
        if key == "local_mean" and evaluation.get("local"):
            low, high = min(evaluation["local"]), max(evaluation["local"])
        name = words.sentence_case(MODELS.get(key, key.replace("_", " ")))
        rows.append(charts.Bar(name, words.percent(rate), rate, low, high, strong=key == "global"))
    return rows


def _facts(run: FinishedRun) -> list[tuple[str, str]]:
    settings, hardware = run.config.get("settings", {}), run.config.get("hardware", {})
    seconds = sum(run.metrics.get("seconds", {}).values())
    gpus, upload = hardware.get("gpus") or [], run.metrics.get("upload_mb")
    facts = [
        ("dataset", settings.get("data.source")),
        ("model", settings.get("model.name")),
        ("method", settings.get("run.method")),
        ("clients", str(run.metrics.get("clients", {}).get("accepted", "–"))),
        ("upload", None if upload is None else f"{upload:.3g} MB a client"),
        ("duration", words.duration(seconds)),
        ("hardware", gpus[0] if gpus and hardware.get("device") != "cpu" else f"{hardware.get('cpus', '?')} CPU cores"),
        ("started", str(run.status.get("started", ""))[:16].replace("T", " ") + " UTC"),
    ]
    return [(name, str(value)) for name, value in facts if value]


def _accuracy(evaluation: Mapping[str, Any], names: list[str]) -> dict[str, object]:
    table = evaluation["per_class"]
    series = [(words.sentence_case(name), table[key]) for key, name in MODELS.items() if key in table]
    shares = [[count / max(1, sum(row)) for count in row] for row in evaluation["confusion"]]
    if len(names) <= _LARGEST_TABLE:
        shown = [[f"{100 * share:.0f}" if share >= 0.005 else "" for share in row] for row in shares]
        confusion = charts.heat(names, names, shares, shown=shown)
    else:
        import torch

        picture = matrix(torch.tensor(shares))
        confusion = Markup('<img class="matrix" alt="confusion matrix" src="{}">').format(picture)
    return {
        "count": f"{evaluation['num_images']:,}",
        "split": evaluation["split"],
        "local_range": bool(evaluation.get("local")),
        "chart": charts.intervals(accuracy_bars(evaluation)),
        "classes": charts.class_dots(names, series),
        "metrics": _metrics(evaluation.get("metrics", {})),
        "confusion": confusion,
    }


def _metrics(found: Mapping[str, Mapping[str, float]]) -> dict[str, object] | None:
    """Return a table of the other metrics with one column for each model; None if the run has no other metrics."""
    models = [key for key in MODELS if key in found]
    rows = [
        {
            "title": words.sentence_case(metric.title),
            "note": metric.note,
            "values": [metric.text(found[key].get(metric.name)) for key in models],
        }
        for metric in METRICS
        if any(metric.name in found[key] for key in models)
    ]
    return {"models": [words.sentence_case(MODELS[key]) for key in models], "rows": rows} if rows else None


def _tables(run: FinishedRun) -> list[dict[str, object]]:
    defaults = Settings().flat()
    settings = run.config.get("settings", {})
    rows = [(key, _plain(value), key in defaults and defaults[key] != value) for key, value in settings.items()]
    rows.sort(key=lambda row: not row[2])
    versions = [(name, value, False) for name, value in run.config.get("versions", {}).items()]
    versions.append(("code", str(run.config.get("digest", ""))[:12], False))
    hardware = [(name, _plain(value), False) for name, value in run.config.get("hardware", {}).items()]
    note = "● marks a value that differs from the default. On a CPU the same settings give the same results."
    if recipe := run.config.get("recipe"):
        keys = ", ".join(recipe["keys"]) or "no value"
        note += f" The recipe {recipe['name']} ({recipe['reason']}) set {keys}."
    return [
        {"title": "Settings", "rows": rows, "note": note},
        {"title": "Versions", "rows": versions, "note": ""},
        {"title": "Machine", "rows": hardware, "note": ""},
    ]


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    return str(value) if value != "" else '""'

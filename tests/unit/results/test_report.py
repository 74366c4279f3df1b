"""The report: what it says, and that it is one page which needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedmitr_flwr.cli import app
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models.flops import count_flops
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.results.flops import kept_schedule
from fedmitr_flwr.results.report import FinishedRun, charts, comparison_page, load_run, run_page, words
from fedmitr_flwr.results.report.data import _pixels
from fedmitr_flwr.settings import InversionSettings, SettingsError
from tests.unit.results.finished import edit_json, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"), "first")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"), "second", **{"distill.steps": 25, "run.seed": 7})


class Page(HTMLParser):
    """Text, references and open tags of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.links, self.open = "", [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "input", "path", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_run_leaves_a_report_that_needs_no_other_file_and_no_network(run: Path) -> None:
    html = (run / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert all(link.startswith("data:") for link in page.links)
    assert "<script" not in html
    assert not re.search(r"(?<!xmlns=\")https?://", html)
    assert len(html) < 5 * 2**20


def test_it_says_what_came_out_and_who_is_missing(run: Path) -> None:
    text = Page((run / "report.html").read_text()).text
    accuracy = json.loads((run / "metrics.json").read_text())["accuracy"]
    for rate in accuracy.values():
        assert f"{100 * rate:.1f} %" in text
    assert "From the uploads of 2 of 3 clients in one round" in text
    assert "head.weight holds NaN or Inf" in text
    assert "distill.noise" in text


def test_the_accuracies_stand_among_the_events(run: Path) -> None:
    finished = load_run(run)
    (event,) = [e for e in finished.events if (e["kind"], e["stage"]) == ("progress", "evaluate")]
    for name, rate in finished.metrics["accuracy"].items():
        assert event[name] == pytest.approx(rate, abs=1e-5)


def test_names_from_outside_stay_text(run: Path) -> None:
    html = (run / "report.html").read_text()
    assert "<b>site 0</b>" not in html
    assert "<b>site 0</b>" in Page(html).text


def test_it_shows_the_images_at_every_stop(run: Path) -> None:
    shots = load_run(run).pictures
    assert {"stop.0000002.images", "stop.0000004.images"} <= set(shots)
    assert shots["stop.0000002.kept"].sum(1).unique().tolist() == [11]
    assert shots["stop.0000004.kept"].sum(1).unique().tolist() == [7]
    first = shots["labels"].tolist().index(3)
    assert torch.equal(shots["kept"][first], shots["stop.0000004.kept"][3])
    text = Page((run / "report.html").read_text()).text
    assert "iteration 2" in text
    assert "iteration 4" in text


def test_watching_changes_no_number(run: Path, tmp_path: Path) -> None:
    silent = make_run(tmp_path, "silent", listening=False)
    first, second = (json.loads((path / "metrics.json").read_text())["accuracy"] for path in (run, silent))
    assert first == second
    weights = [load_file(path / "model" / "model.safetensors") for path in (run, silent)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "Synthetic images" in (silent / "report.html").read_text()


@pytest.mark.parametrize(
    ("method", "stages", "made"),
    [
        ("fedavg", set(), "It averaged the uploaded weights by the clients' numbers of images. It distilled nothing."),
        ("lda", set(), "It added up the clients' feature moments"),
        ("ridge", set(), "a least-squares classifier with regularisation 0.1 from them"),
        ("random-images", {"distill"}, "labelled random images"),
        ("dense", set(), "24 generated images"),
        ("dense-inversion", {"invert", "invert_dense", "relabel", "distill"}, "inverted the ensemble"),
    ],
)
def test_report_and_card_of_a_baseline_tell_what_it_did_and_nothing_more(
    tmp_path: Path, method: str, stages: set[str], made: str
) -> None:
    path = make_run(tmp_path, method, **{"run.method": method})
    flops = json.loads((path / "report.json").read_text())["flops"]
    text = Page((path / "report.html").read_text()).text
    card = (path / "model" / "README.md").read_text()
    assert flops.keys() == stages
    assert flops.get("invert") == flops.get("invert_dense")
    assert "Patches are stopped" not in text
    assert "Without stopping patches" not in text
    assert ("Synthetic images" in text) == ("invert" in stages or method == "dense")
    assert made in card
    assert made.replace("It ", "The server ", 1) in text
    assert "FedMITR" not in card
    assert ("feature moments with the counts of each class" in card) == (method in ("lda", "ridge"))
    assert ("the feature of that image" in card) == (method in ("lda", "ridge"))


def test_memory_is_drawn_by_stage(run: Path) -> None:
    text = Page((run / "report.html").read_text()).text
    assert "Memory of the server process" in text
    assert len(re.findall(r"[\d,]+ MiB", text.split("Memory of the server process")[1])) >= 4


def test_what_clients_shared_and_what_their_uploads_tell_stand_side_by_side(run: Path) -> None:
    finished = load_run(run)
    assert "Label histograms that the clients shared" not in run_page(finished)
    counts = [{"histogram": [7] * 10} if event.get("outcome") == "accepted" else {} for event in finished.events]
    events = [{**event, **more} for event, more in zip(finished.events, counts, strict=True)]
    page = run_page(replace(finished, events=events))
    assert "Label histograms that the clients shared" in page
    assert "Label histograms estimated from the uploads" in page
    assert "No client shared its label histogram" not in page


def test_without_an_evaluation_it_says_so(tmp_path: Path) -> None:
    path = make_run(tmp_path, "blind", **{"run.evaluate-on": "none"})
    text = Page((path / "report.html").read_text()).text
    assert "Its accuracy is unknown" in text
    assert "No accuracy was measured" in text


def test_it_can_be_rendered_again_from_the_files(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(run), "--output", str(tmp_path / "again.html")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again.html").read_text() == (run / "report.html").read_text() == run_page(load_run(run))


def test_runs_are_compared_side_by_side(run: Path, other: Path, tmp_path: Path) -> None:
    file = tmp_path / "both.html"
    result = CliRunner().invoke(app, ["report", str(run), str(other), "-o", str(file)])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(file)
    page = Page(file.read_text())
    assert page.open == []
    assert "distill.steps" in page.text
    assert "inversion.images" not in page.text
    for name in ("first", "second"):
        assert name in page.text
    assert "cannot be compared" not in page.text
    assert "FLOPs: inversion" in page.text


def test_runs_on_other_data_are_not_ranked(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other-split"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["settings"]["data.split-seed"] = 5
    (copy / "config.json").write_text(json.dumps(config))
    text = Page(comparison_page([load_run(run), load_run(copy)])).text
    assert "These runs use different splits, so their accuracies cannot be compared" in text
    assert "highest accuracy" not in text


def unfinished(path: Path) -> None:
    edit_json(path / "status.json", state="running")


def failed(path: Path) -> None:
    edit_json(path / "status.json", state="failed", error="QuorumError: few")


def from_the_future(path: Path) -> None:
    edit_json(path / "report.json", format=99)


def from_the_past(path: Path) -> None:
    (path / "report.json").unlink()


def no_run(path: Path) -> None:
    (path / "status.json").unlink()


def broken(path: Path) -> None:
    (path / "metrics.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unfinished, "has not finished"),
        (failed, "failed: QuorumError: few"),
        (from_the_future, "has format 99"),
        (from_the_past, "did not write report.json"),
        (no_run, "is not a run"),
        (broken, "metrics.json is not valid JSON"),
    ],
)
def test_a_run_that_cannot_be_read_is_one_line_and_exit_code_2(
    run: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    damage(copy)
    result = CliRunner().invoke(app, ["report", str(copy)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_intervals_are_wilson_s() -> None:
    # Newcombe 1998, table I: 81 of 263.
    low, high = words.wilson(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert words.wilson(0.0, 10)[0] == 0.0
    assert words.wilson(1.0, 10)[1] == pytest.approx(1.0)


def test_the_verdict_does_not_call_what_chance_explains() -> None:
    evaluation = {
        "accuracy": {"global": 0.82, "fedavg": 0.80, "ensemble": 0.9},
        "num_images": 100,
        "split": "test",
    }
    assert "not significantly different from one-shot FedAvg (80.0 %)" in words.verdict(
        {"asked": 2, "accepted": 2}, evaluation, 1
    )
    evaluation["num_images"] = 100_000
    assert "2.0 points above one-shot FedAvg" in words.verdict({"asked": 2, "accepted": 2}, evaluation, 1)


def test_a_class_that_nobody_knows_is_named() -> None:
    found = words.cautions({"asked": 2, "accepted": 2}, None, ["cat", "dog", "eel"], [3, 3, 0])
    assert "no synthetic images of these classes: eel" in found[0]


def test_stopping_patches_shows_in_the_flops() -> None:
    from fedmitr_flwr.models.build import build_model
    from tests.unit.pipeline.test_pipeline import SETTINGS, SOURCE

    settings = InversionSettings(iterations=4000, stops=(50, 100, 200, 300), fractions=(0.3,) * 4)
    spans = kept_schedule(settings, 196)
    assert spans == [(51, 196), (50, 137), (100, 95), (100, 66), (3699, 46)]
    model = build_model(SETTINGS.model, SOURCE.spec)
    grid = PatchGrid.of(model, SOURCE.spec)
    one, all_of_them = count_flops(model, grid, 4), count_flops(model, grid, grid.num_patches)
    assert one < all_of_them < count_flops(model, grid, grid.num_patches, pixel_gradient=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_hundred_classes_and_clients_in_colour_stay_below_5_mb(tmp_path: Path) -> None:
    C, K, draw = 100, 100, torch.Generator().manual_seed(0)
    rates = [[1 / C] * C for _ in range(K)]
    evaluation = {
        "split": "test",
        "num_images": 10_000,
        "accuracy": {"local_mean": 0.1, "fedavg": 0.2, "ensemble": 0.4, "global": 0.3},
        "local": [0.1] * K,
        "per_class": {name: [0.3] * C for name in ("fedavg", "ensemble", "global")},
        "confusion": torch.randint(0, 9, (C, C), generator=draw).tolist(),
    }
    pixels = torch.randint(0, 256, (200, 3, 112, 112), generator=draw, dtype=torch.uint8)
    kept = torch.rand(200, 196, generator=draw) < 0.25
    pictures = {"images": pixels, "kept": kept, "labels": torch.arange(200) // 2, "density": torch.rand(200, 196)}
    for stop in (50, 100, 200, 300):
        pictures |= {f"stop.{stop:07d}.images": pixels[:20], f"stop.{stop:07d}.kept": kept[:20]}
    run = FinishedRun(
        path=tmp_path,
        status={"started": "2026-01-01T00:00:00+00:00"},
        config={"settings": {"ensemble.weighting": "competence"}},
        metrics={"clients": {"asked": K, "accepted": K}, "seconds": {"invert": 7200.0}},
        report={
            "class_names": [f"class number {number}" for number in range(C)],
            "image": {"channels": 3, "size": 224, "grid": [14, 14]},
            "evaluation": evaluation,
            "ensemble": {"weights": rates, "evidence": rates},
        },
        pictures=pictures,
        events=[],
    )
    html = run_page(run)
    assert Page(html).open == []
    assert len(html) < 5 * 2**20
    assert "2 h 00 min" in html


def test_large_images_are_kept_small() -> None:
    spec = ImageSpec(("a", "b"), 3, 224, (0.5,) * 3, (0.5,) * 3)
    assert _pixels(torch.zeros(2, 3, 224, 224), spec).shape == (2, 3, 112, 112)
    assert _pixels(torch.zeros(2, 3, 224, 224), spec).unique().tolist() == [128]


def test_charts_place_values_on_their_scale() -> None:
    chart = charts.intervals([charts.Bar("a & b", "50 %", 0.5, 0.4, 0.6)])
    assert "left:40.00%;width:20.00%" in chart
    assert "a &amp; b" in chart
    line = charts.lines([charts.Series("x", [(0, 1.0), (10, float("nan")), (20, 100.0)])], x="step", y="loss", log=True)
    assert "M0.0,180.0L600.0,0.0" in line
    assert charts.lines([charts.Series("x", [])], x="step", y="loss") == ""


@pytest.mark.parametrize(
    ("values", "log", "ticks"),
    [
        ((0.0, 2.3), False, [0, 0.5, 1, 1.5, 2, 2.5]),
        ((-1.0, 1.0), False, [-1, -0.5, 0, 0.5, 1]),
        ((0.0, 0.0), False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ((0.02, 0.3), True, [0.01, 0.1, 1]),
        ((0.5, 0.5), True, [0.1, 1]),
        ((1e-3, 1e4), True, [1e-3, 1e-1, 1e1, 1e3, 1e5]),
    ],
)
def test_the_axis_of_a_chart_has_round_numbers_that_enclose_the_values(
    values: tuple[float, float], log: bool, ticks: list[float]
) -> None:
    chart = charts.lines([charts.Series("x", list(enumerate(values)))], x="step", y="loss", log=log)
    assert re.findall(r'<b style="top:[\d.]+%">([^<]+)</b>', chart) == [f"{tick:g}" for tick in ticks]


def test_a_run_of_another_version_is_refused_by_its_name(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["settings"]["distill.magic"] = 3
    config["versions"]["fedmitr-flwr"] = "9.9"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=r"written by version 9\.9, this is version .*distill\.magic"):
        load_run(copy).settings()

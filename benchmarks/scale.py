"""Measure how collection scales with the number of clients: server memory, time, overhead over plain Flower.

    python -m benchmarks.scale --clients 200 --collect-only     # random uploads of 5.7 million parameters
    python -m benchmarks.scale --clients 200                    # a whole run on MNIST-5k, Dirichlet(0.3)

The clients are simulated by Flower on Ray and answer with the initialisation plus noise, at once or after
`--client-seconds` of work (`benchmarks/scale_app.py`). Each variant is a `flwr run` of its own, and the measured
process is that of its ServerApp. `bare_flower_seconds` is the same simulation with the same window whose server takes
each reply and drops it. Times are of the exchange alone, without the start of Ray and after a first message to each
worker; peaks are of the whole process. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedmitr_flwr.launch.private_flower import PrivateFlower
from fedmitr_flwr.launch.settings_files import federation_config, federation_toml
from fedmitr_flwr.settings.docs import to_toml

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = {"deit-tiny": 5_717_416, "demo": 207_626}

# A Flower app whose code is benchmarks/scale_app.py of this checkout.
APP = """\
[project]
name = "scale"
version = "1"
description = "Collection, measured"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedmitr-flwr"

[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"

[tool.flwr.app.config]
"""
CODE = """\
from benchmarks import scale_app

client = scale_app.client
server = scale_app.server
"""


def main() -> None:
    arguments = parser().parse_args()
    if arguments.collect_only:
        results = {variant: exchange(arguments, variant) for variant in arguments.order.split(",")}
        print(json.dumps(summary(arguments, results)))
    else:
        print(json.dumps(whole_run(arguments)))


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--clients", type=int, default=200)
    out.add_argument("--collect-only", action="store_true", help="send random uploads instead of training")
    out.add_argument(
        "--size", choices=PARAMETERS, default="deit-tiny", help="model whose number of parameters an upload has"
    )
    out.add_argument("--window", type=int, default=0, help="run.window")
    out.add_argument("--output", type=Path, default=None, help="where uploads go; default: a temporary folder")
    out.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of a whole run")
    out.add_argument("--order", default="bare,ours", help="which variants to run, in which order")
    return out


def summary(arguments: argparse.Namespace, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    ours, bare = results.get("ours", {}), results.get("bare", {})
    return {
        "clients": arguments.clients,
        "accepted": ours.get("accepted"),
        "server_peak_rss_mb": ours.get("peak_rss_mb"),
        "seconds": ours.get("seconds"),
        "bare_flower_seconds": bare.get("seconds"),
        "server_cpu_seconds": ours.get("server_cpu_seconds"),
        "bare_flower_server_cpu_seconds": bare.get("server_cpu_seconds"),
        "bare_flower_peak_rss_mb": bare.get("peak_rss_mb"),
        "rss_after_imports_mb": ours.get("rss_after_imports_mb"),
        "validate_and_write_seconds": ours.get("collect_seconds"),
        "disk_mb": ours.get("disk_mb"),
        "parameters": PARAMETERS[arguments.size],
        "window": ours.get("window", bare.get("window")),
        "client_seconds": arguments.client_seconds,
        "cpus": os.cpu_count(),
    }


def exchange(arguments: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Run one variant, "ours" or "bare", as a simulation and return what its ServerApp measured."""
    cpus = len(os.sched_getaffinity(0))
    with PrivateFlower() as flower:
        app, federation, measured = flower.home / "app", flower.home / "federation.toml", flower.home / "measured.json"
        config: dict[str, bool | int | float | str] = {
            "variant": variant,
            "clients": arguments.clients,
            "size": arguments.size,
            "client-seconds": arguments.client_seconds,
            "window": arguments.window or 2 * cpus,
            "output": str((arguments.output or Path(tempfile.gettempdir())).absolute()),
            "measured": str(measured),
        }
        app.mkdir()
        (app / "pyproject.toml").write_text(APP + to_toml(config))
        (app / "app.py").write_text(CODE)
        simulation = federation_config(clients=arguments.clients, cpus=cpus) | {"init-args-logging-level": "ERROR"}
        federation.write_text(federation_toml(simulation))
        flower.environment["PYTHONPATH"] = str(ROOT)
        process = flower.start("run", str(app), "--stream", "--federation-config", str(federation))
        output, _ = process.communicate()
        if not measured.is_file():
            raise RuntimeError(f"the simulation measured nothing:\n{output[-4000:]}")
        result: dict[str, Any] = json.loads(measured.read_text())
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def whole_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all stages with clients that train."""
    output = arguments.output or Path(tempfile.mkdtemp(prefix="fedmitr-scale-"))
    command = ["fedmitr", "simulate", "conf/demo.toml", "--clients", str(arguments.clients), "--output", str(output)]
    command += ["--set", "run.name=scale", "--set", "partition.alpha=0.3", "--set", f"run.window={arguments.window}"]
    command += [part for setting in arguments.set for part in ("--set", setting)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    seconds = time.perf_counter() - start
    metrics = json.loads((output / "scale" / "metrics.json").read_text())
    return {
        "clients": arguments.clients,
        "set": arguments.set,
        "accepted": metrics["clients"]["accepted"],
        "server_peak_rss_mb": metrics["peak_rss_mb"],
        "seconds": round(seconds, 1),
        "stages": metrics["seconds"],
        "accuracy": metrics["accuracy"],
        "cpus": os.cpu_count(),
    }


if __name__ == "__main__":
    main()

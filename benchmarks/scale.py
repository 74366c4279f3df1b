"""Measure how collection scales with the number of clients: server memory, time, overhead over plain Flower.

    python -m benchmarks.scale --clients 200 --collect-only     # random uploads of 5.7 million parameters
    python -m benchmarks.scale --clients 200                    # a whole run on MNIST-5k, Dirichlet(0.3)

Flower simulates the clients on Ray. Each client answers with the initialisation plus noise, at once or after
`--client-seconds` of work. Each variant runs in a separate process, which is the ServerApp's process of a simulation.
`bare_flower_seconds` is the time of the same simulation with the same window and a server that drops each reply. Times
are of the exchange alone: without the start of Ray, and after a first message to each worker. Memory peaks are of the
whole process. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PARAMETERS = {"deit-tiny": 5_717_416, "demo": 207_626}
STAGES = "ours", "bare"


def main() -> None:
    arguments = parser().parse_args()
    if arguments.variant:
        print(json.dumps(exchange(arguments)))
    elif arguments.collect_only:
        results = {name: in_process(name) for name in arguments.order.split(",")}
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
    out.add_argument(
        "--client-seconds", type=float, default=0.0, help="least CPU time in seconds that a client takes for its upload"
    )
    out.add_argument("--window", type=int, default=0, help="value of run.window")
    out.add_argument("--output", type=Path, default=None, help="folder for uploads; default: a temporary folder")
    out.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="changes a setting of a whole run; repeatable"
    )
    out.add_argument("--order", default="bare,ours", help="variants to run, in this order")
    out.add_argument("--variant", choices=STAGES, default=None, help=argparse.SUPPRESS)
    return out


def in_process(variant: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scale", *sys.argv[1:], "--variant", variant]
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


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


def exchange(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one variant in this process."""
    import psutil
    import torch
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from fedmitr_flwr.data import ImageSpec
    from fedmitr_flwr.federation.exchange.windowed_grid import WindowedGrid
    from fedmitr_flwr.federation.quorum import wait_for_nodes
    from fedmitr_flwr.federation.strategy import FedMITR
    from fedmitr_flwr.federation.uploads.records import encode_state
    from fedmitr_flwr.federation.workers import close_pool, end_busy_actors, replace_dead_actors
    from fedmitr_flwr.runs.directory import RunDirectory
    from fedmitr_flwr.runs.log import console_log
    from fedmitr_flwr.runs.observer import Observer
    from fedmitr_flwr.runs.process_memory import peak_rss_mb
    from fedmitr_flwr.settings import Settings

    result: dict[str, Any] = {"variant": arguments.variant, "rss_after_imports_mb": rss_mb()}
    window = arguments.window or 2 * len(psutil.Process().cpu_affinity())
    settings = Settings().replace(**{"run.window": window, "run.min-clients": arguments.clients})
    spec = ImageSpec(("a", "b"), 3, 224, (0.5,) * 3, (0.5,) * 3)
    client = ClientApp()

    @client.query()
    def warm(message: Message, context: Context) -> Message:
        import torch  # noqa: F401

        return Message(RecordDict(), reply_to=message)

    @client.train()
    def train(message: Message, context: Context) -> Message:
        import numpy as np
        from flwr.app import Array

        begun = time.process_time()
        partition = int(context.node_config["partition-id"])
        noise = np.random.default_rng(partition)
        arrays = {
            name: Array(array.numpy() + 0.01 * noise.standard_normal(array.shape, np.float32))
            for name, array in message.content.array_records["arrays"].items()
        }
        config = message.content.config_records["config"]
        about = {"digest": config["digest"], "client": f"partition-{partition}", "dtype": "fp32"}
        numbers = MetricRecord({"num-examples": partition + 1, "loss": 0.5, "accuracy": 0.5})
        while time.process_time() - begun < arguments.client_seconds:
            pass
        content = RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord(about), "metrics": numbers})
        return Message(content, reply_to=message)

    server = ServerApp()

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        replace_dead_actors()
        nodes = wait_for_nodes(grid.get_node_ids, settings.run)
        first = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes[: 2 * window]]
        for _ in bare_flower(grid, first, window):
            pass
        output = arguments.output or Path(tempfile.gettempdir())
        with tempfile.TemporaryDirectory(dir=output) as folder, console_log():
            directory = RunDirectory.create(folder, "scale")
            strategy = FedMITR(settings, spec, directory, device=torch.device("cpu"), observer=Observer())
            messages = list(strategy.configure_train(1, encode_state(blank(arguments.size)), ConfigRecord(), grid))
            start, begun = time.perf_counter(), time.process_time()
            if arguments.variant == "ours":
                replies = WindowedGrid(grid, settings.run, end_busy_actors).send_and_receive(messages, timeout=3600.0)
                _, counts = strategy.collect(1, replies)
                result["accepted"] = counts.accepted
                result["collect_seconds"] = round(strategy.seconds["collect"], 2)
            else:
                result["accepted"] = sum(1 for _ in bare_flower(grid, messages, window))
            result["seconds"] = round(time.perf_counter() - start, 2)
            result["server_cpu_seconds"] = round(time.process_time() - begun, 2)
            result["memory"] = memory()
            files = [path.stat().st_size for path in directory.path.rglob("*.safetensors")]
            result["disk_mb"] = round(sum(files) / 2**20, 1)
        close_pool()

    run_simulation(
        server,
        client,
        arguments.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"logging_level": "ERROR"},
        },
    )
    return {**result, "window": window, "peak_rss_mb": round(peak_rss_mb(), 1)}


def bare_flower(grid: Any, messages: Iterable[Any], window: int) -> Iterator[None]:
    """Exchange messages with Flower's calls alone: push up to the window, pull, drop the replies."""
    waiting, flying = list(messages), set[str]()
    while waiting or flying:
        room = window - len(flying)
        flying |= set(grid.push_messages(waiting[:room]))
        waiting = waiting[room:]
        replies = grid.pull_messages(flying)
        flying -= {reply.metadata.reply_to_message_id for reply in replies}
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(reply.error.reason)
            yield None
        if not replies:
            time.sleep(0.1)  # as Flower's grid does


def blank(size: str) -> dict[str, Any]:
    """Return a state dict with the tensors and parameters of the model that `size` names."""
    import timm

    options: dict[str, Any] = {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
    }
    if size == "demo":
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **options)
    else:
        model = timm.create_model("deit_tiny_patch16_224", num_classes=1000)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def memory() -> dict[str, int]:
    """Return the resident memory of this process in MiB: its own, shared with Ray's object store, mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) // 1024 for name in ("RssAnon", "RssShmem", "RssFile")}


def rss_mb() -> float:
    import psutil

    return round(float(psutil.Process().memory_info().rss) / 2**20, 1)


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

"""The Flower app that `benchmarks.scale` measures: clients that do not train, and a server that takes replies."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import timm
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

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

client = ClientApp()
server = ServerApp()


@client.query()
def warm(message: Message, context: Context) -> Message:
    """Answer with nothing; by then this worker has imported torch."""
    return Message(RecordDict(), reply_to=message)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Answer with the initialisation plus noise, after at least `client-seconds` of CPU time."""
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
    while time.process_time() - begun < float(context.run_config["client-seconds"]):
        pass
    content = RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord(about), "metrics": numbers})
    return Message(content, reply_to=message)


@server.main()
def run(grid: Grid, context: Context) -> None:
    """Ask all clients once, take their replies, and write down what that cost."""
    config = context.run_config
    window, variant = int(config["window"]), str(config["variant"])
    settings = Settings().replace(**{"run.window": window, "run.min-clients": int(config["clients"])})
    spec = ImageSpec(("a", "b"), 3, 224, (0.5,) * 3, (0.5,) * 3)
    result: dict[str, Any] = {"variant": variant, "rss_after_imports_mb": rss_mb()}
    replace_dead_actors()
    nodes = wait_for_nodes(grid.get_node_ids, settings.run)
    first = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes[: 2 * window]]
    for _ in bare_flower(grid, first, window):
        pass
    with tempfile.TemporaryDirectory(dir=str(config["output"])) as folder, console_log():
        directory = RunDirectory.create(folder, "scale")
        strategy = FedMITR(settings, spec, directory, device=torch.device("cpu"), observer=Observer())
        initial = encode_state(blank(str(config["size"])))
        messages = list(strategy.configure_train(1, initial, ConfigRecord(), grid))
        start, begun = time.perf_counter(), time.process_time()
        if variant == "ours":
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
    result |= {"window": window, "peak_rss_mb": round(peak_rss_mb(), 1)}
    Path(str(config["measured"])).write_text(json.dumps(result))


def bare_flower(grid: Any, messages: Iterable[Any], window: int) -> Iterator[None]:
    """Flower's own calls and nothing else: push up to the window, pull, drop."""
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
    """A state dict with as many parameters and tensors as the model has."""
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
    """Resident memory of this process now: its own, and pages it shares with Ray's object store, in MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) // 1024 for name in ("RssAnon", "RssShmem", "RssFile")}


def rss_mb() -> float:
    return round(float(psutil.Process().memory_info().rss) / 2**20, 1)

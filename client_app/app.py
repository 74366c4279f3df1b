"""The ClientApp: trains once on local images and uploads the weights."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.federation.code_digest import check_digest
from fedmitr_flwr.federation.uploads.records import check_initial, decode_trusted, encode_state
from fedmitr_flwr.models.feature_prior import FeaturePrior
from fedmitr_flwr.runs.log import console_log
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.training.client import client_name, train_client
from fedmitr_flwr.training.time_limit import time_limit
from fedmitr_flwr.training.upload import ClientTask

log = logging.getLogger("fedmitr.client")

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return the reply to a train message: weights, a count of zero examples, or an error.

    An exception becomes an error reply here and not in Flower. Flower's own reply would lack the client's name and
    begin with the type of the exception.
    """
    name = client_name(context.node_config, context.node_id)
    try:
        with _log_of(context.node_config):
            return Message(_train(message.content, context, name), reply_to=message)
    except Exception as error:
        headline = f"{name}: {type(error).__name__}: {error}"
        log.error(headline)
        reason = f"{headline}\n{traceback.format_exc()}"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Return this client's name, so that a resumed run asks only the clients whose upload is missing."""
    name = client_name(context.node_config, context.node_id)
    return Message(RecordDict({"config": ConfigRecord({"client": name})}), reply_to=message)


@contextmanager
def _log_of(node_config: Mapping[str, object]) -> Iterator[None]:
    """Log which images a site uses. Simulated clients share a source, and the server's log says it once."""
    if "data-path" in node_config:
        with console_log():
            yield
        return
    data = logging.getLogger("fedmitr.data")
    level = data.level
    data.setLevel(logging.ERROR)
    try:
        yield
    finally:
        data.setLevel(level)


def _prior(content: RecordDict) -> FeaturePrior | None:
    arrays = content.array_records.get("prior")
    return None if arrays is None else FeaturePrior.from_tensors(decode_trusted(arrays))


def _train(content: RecordDict, context: Context, name: str) -> RecordDict:
    config = content.config_records["config"]
    digest = check_digest(str(config["digest"]))  # first, because other code may read the rest differently
    settings = Settings.from_stored(json.loads(str(config["settings"])))
    initial = decode_trusted(content.array_records["arrays"])
    start = check_initial(initial, str(config["initial"]))
    task = ClientTask(
        settings=settings,
        spec=ImageSpec.from_json(str(config["spec"])),
        round_number=int(str(config["round"])),
        initial=initial,
        prior=_prior(content),
    )
    limit = settings.train.time_limit_seconds or settings.run.deadline_seconds
    with time_limit(limit, "training"):
        upload = train_client(task, context.node_config, name)
    dtype = settings.train.upload_dtype
    config = ConfigRecord({"digest": digest, "client": name, "dtype": dtype, "initial": start})
    answer = RecordDict({"config": config})
    partition = context.node_config.get("partition-id")
    metrics = MetricRecord({"partition-id": partition} if isinstance(partition, int) else {})
    if upload is None:
        metrics["num-examples"] = 0
        log.info("%s has no data", name)
    else:
        metrics["num-examples"] = upload.num_examples
        for key, value in upload.numbers.items():
            metrics[key] = value
        if upload.histogram is not None:
            metrics["histogram"] = list(upload.histogram)
        answer["arrays"] = encode_state(upload.state, dtype)
        if upload.moments is not None:
            log.info("%s shares feature moments (train.share-moments)", name)
            answer["moments"] = encode_state(upload.moments.tensors())
    answer["metrics"] = metrics
    return answer

"""FedMITR as a Flower strategy: Flower's four methods around uploads and pipeline.

Letters: K clients that uploaded, C classes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, Metadata, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.digest import code_digest, short
from fedmitr_flwr.observe import Observer
from fedmitr_flwr.pipeline import ClientModel, Pipeline, PipelineResult, run_pipeline
from fedmitr_flwr.quorum import ClientCounts, check_quorum, wait_for_nodes
from fedmitr_flwr.roster import Roster
from fedmitr_flwr.rundir import RunDirectory
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.uploads import Upload, UploadRefused, UploadStore
from fedmitr_flwr.wire import decode_state, decode_trusted, encode_state

log = logging.getLogger("fedmitr.strategy")

# Error replies that the SuperLink makes itself carry its own id instead of the silent node's.
_SUPERLINK_NODE_ID = 1


@dataclass(frozen=True)
class RoundOutcome:
    """What a round left behind.

    Attributes
    ----------
    result
        Of the pipeline.
    uploads
        The K accepted uploads, in the order in which the pipeline saw them.
    clients
        What became of the clients that were asked.
    """

    result: PipelineResult
    uploads: tuple[Upload, ...]
    clients: ClientCounts


class FedMITR(Strategy):
    """One-shot federated learning for Vision Transformers (FedMITR, arXiv 2605.10748).

    Asks every connected client to train once, keeps the uploads that pass validation, and turns them into one
    global model without any data. With more rounds the global model is the next round's initialisation.

    Parameters
    ----------
    settings
        All settings of the run; the clients get them with the train message.
    spec
        Classes, geometry and normalisation.
    run
        Where uploads are kept.
    device
        Where the pipeline runs.
    observer
        Receives the pipeline's events.
    pipeline
        What turns uploads into a model.

    Attributes
    ----------
    outcome
        Of the last finished round; None before.
    seconds
        Wall-clock seconds over all rounds: ``clients`` (from asking to the last reply) and ``collect``
        (validating and writing uploads).
    """

    def __init__(
        self,
        settings: Settings,
        spec: ImageSpec,
        run: RunDirectory,
        *,
        device: torch.device,
        observer: Observer,
        pipeline: Pipeline = run_pipeline,
    ) -> None:
        self.settings = settings
        self.spec = spec
        self.run = run
        self.device = device
        self.observer = observer
        self.pipeline = pipeline
        self.digest = code_digest()
        self.roster = Roster(settings.run.roster)
        self.outcome: RoundOutcome | None = None
        self.seconds = {"clients": 0.0, "collect": 0.0}
        self._initial: dict[str, Tensor] = {}
        self._asked: list[Metadata] = []
        self._asked_at = 0.0

    def summary(self) -> None:
        """Log the strategy's main settings in Flower's style."""
        run, train, inversion = self.settings.run, self.settings.train, self.settings.inversion
        stops = ", ".join(map(str, inversion.stops)) or "none (dense)"
        log.info("\t├──> Method: %s", run.method)
        log.info("\t├──> Quorum: %d uploads, %.0f %% of the asked", run.min_clients, 100 * run.min_fraction)
        log.info("\t├──> Clients: %s weights, histograms %s", train.upload_dtype, _yes(train.share_label_histogram))
        log.info("\t├──> Ensemble: weights by %s", self.settings.ensemble.weighting)
        log.info("\t├──> Inversion: %d images, %d iterations", inversion.images, inversion.iterations)
        log.info("\t│\t└── Patches stop at: %s", stops)
        log.info("\t├──> Distillation: %d steps on %s", self.settings.distill.steps, self.device)
        log.info("\t└──> Code: %s", short(self.digest))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every connected node to train, once there are `run.min-clients` of them.

        Raises
        ------
        QuorumError
            If too few nodes connect within `run.wait-nodes-seconds`.
        """
        run = self.settings.run
        nodes = wait_for_nodes(grid.get_node_ids, run)
        self._initial = decode_trusted(arrays)
        ours: dict[str, str | int] = {
            "digest": self.digest,
            "settings": json.dumps(self.settings.flat()),
            "spec": self.spec.to_json(),
            "round": server_round,
        }
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({**config, **ours})})
        messages = [Message(content, node, MessageType.TRAIN, group_id=str(server_round)) for node in nodes]
        log.info("configure_train: asking %d clients (round %d)", len(messages), server_round)
        self._asked = [message.metadata for message in messages]
        self._asked_at = time.perf_counter()
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Keep the good uploads and turn them into the global model.

        Parameters
        ----------
        server_round
            Counted from 1.
        replies
            Consumed one by one: each upload is validated, written to disk and dropped before the next is taken.

        Returns
        -------
        arrays
            The global model, fp32.
        metrics
            Counts of clients, and their mean local loss and accuracy weighted by examples.

        Raises
        ------
        QuorumError
            If fewer uploads are usable than `run.min-clients` and `run.min-fraction` ask for.
        """
        store = UploadStore(
            self.run.uploads(server_round),
            self._initial,
            self.spec.num_classes,
            needs_histogram=self.settings.train.share_label_histogram,
        )
        counts = self._collect(store, replies)
        log.info("aggregate_train: %s", counts)
        check_quorum(counts, self.settings.run)
        uploads = store.uploads()
        clients = [ClientModel(store.load(upload), upload.num_examples, upload.histogram) for upload in uploads]
        seed = self.settings.run.seed + server_round - 1
        result = self.pipeline(
            self.settings, self.spec, clients, self._initial, seed=seed, device=self.device, observer=self.observer
        )
        self.outcome = RoundOutcome(result, tuple(uploads), counts)
        return encode_state(result.state), _metrics(uploads, counts)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the server evaluates on its own held-out images."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Nobody was asked."""

    def _collect(self, store: UploadStore, replies: Iterable[Message]) -> ClientCounts:
        """Go through the replies as they come; the time between them is the clients', the rest is ours."""
        tally = {"accepted": 0, "refused": 0, "failed": 0, "empty": 0}
        working = 0.0
        for reply in replies:
            start = time.perf_counter()
            tally[self._receive(store, reply)] += 1
            working += time.perf_counter() - start
        self.seconds["collect"] += working
        self.seconds["clients"] += time.perf_counter() - self._asked_at - working
        silent = len(self._asked) - sum(tally.values())
        if silent > 0:
            log.warning("\t├──! %d clients did not answer within %g s", silent, self.settings.run.deadline_seconds)
            tally["failed"] += silent
        return ClientCounts(asked=len(self._asked), **tally)

    def _receive(self, store: UploadStore, reply: Message) -> str:
        """Take one reply and say which count it belongs to."""
        node = self._node(reply.metadata)
        if reply.has_error():
            reason = reply.error.reason or ""
            log.warning("\t├──! node %d failed (code %d): %s", node, reply.error.code, failure_reason(reason))
            log.debug("node %d, in full: %s", node, reason[:10_000])
            return "failed"
        try:
            upload = self._accept(store, reply.content, node)
        except UploadRefused as refusal:
            log.warning("\t├──! upload of node %d refused: %s", node, refusal)
            return "refused"
        except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
            # A reply that breaks the validation itself is a bad upload too: the others cannot be sent again.
            log.warning("\t├──! upload of node %d refused: unreadable (%s)", node, type(error).__name__)
            log.debug("node %d, in full:", node, exc_info=True)
            return "refused"
        finally:
            reply.content.clear()  # Flower holds on to the message; its arrays need not stay in memory
        if upload is None:
            log.info("\t├──> node %d has no data", node)
            return "empty"
        log.info("\t├──> %s: %d images, local accuracy %.3f", upload.client, upload.num_examples, upload.accuracy)
        return "accepted"

    def _accept(self, store: UploadStore, content: RecordDict, node: int) -> Upload | None:
        """Validate a reply's records and store the upload; None from a client without data."""
        config = content.config_records.get("config", ConfigRecord())
        metrics = content.metric_records.get("metrics", MetricRecord())
        arrays = content.array_records.get("arrays")
        digest = config.get("digest")
        if digest != self.digest:
            raise UploadRefused(f"made by other code: {short(str(digest))}, the server runs {short(self.digest)}")
        client = store.check_client(config.get("client"))
        self.roster.check(node, client)
        num_examples = metrics.get("num-examples")
        if arrays is None:
            if num_examples == 0:
                return None
            raise UploadRefused("has no arrays")
        return store.accept(
            client,
            decode_state(arrays, store, config.get("dtype")),
            num_examples=num_examples,
            loss=metrics.get("loss"),
            accuracy=metrics.get("accuracy"),
            # One that was not asked for is not kept, whatever the client thinks of it.
            histogram=metrics.get("histogram") if self.settings.train.share_label_histogram else None,
        )

    def _node(self, metadata: Metadata) -> int:
        if metadata.src_node_id != _SUPERLINK_NODE_ID:
            return metadata.src_node_id
        asked = {message.message_id: message.dst_node_id for message in self._asked}
        return asked.get(metadata.reply_to_message_id, metadata.src_node_id)


def failure_reason(text: str) -> str:
    """Return the line of an error reply that says what happened.

    Our ClientApp puts it first; Flower's own replies have it at the end of a traceback.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    own = not lines[0].startswith(("Traceback", "<class"))
    return lines[0 if own else -1][:500]


def _metrics(uploads: Sequence[Upload], counts: ClientCounts) -> MetricRecord:
    total = sum(upload.num_examples for upload in uploads)
    return MetricRecord(
        {
            **{f"clients-{name}": number for name, number in counts.as_dict().items()},
            "num-examples": total,
            "local-loss": sum(upload.loss * upload.num_examples for upload in uploads) / total,
            "local-accuracy": sum(upload.accuracy * upload.num_examples for upload in uploads) / total,
        }
    )


def _yes(value: bool) -> str:
    return "shared" if value else "withheld"

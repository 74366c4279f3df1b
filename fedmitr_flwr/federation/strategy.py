"""FedMITR as a Flower strategy: collect the uploads of a round and run the pipeline on them.

Letters: K clients that uploaded, C classes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.ensemble.bounds import bounded_counts
from fedmitr_flwr.federation.code_digest import code_digest, short
from fedmitr_flwr.federation.collection import Collection, close_collection, closed_collection, nodes_without
from fedmitr_flwr.federation.exchange.windowed_grid import WindowedGrid
from fedmitr_flwr.federation.quorum import ClientCounts, check_quorum, wait_for_nodes
from fedmitr_flwr.federation.roster import Roster
from fedmitr_flwr.federation.uploads.layout import Layout
from fedmitr_flwr.federation.uploads.records import decode_trusted, encode_state, unguessable
from fedmitr_flwr.federation.uploads.store import StoredUpload, UploadStore
from fedmitr_flwr.models.trainable import KEY, trained_part
from fedmitr_flwr.pipeline.checkpoints import Checkpoints
from fedmitr_flwr.pipeline.inputs import Pipeline, PipelineInputs, PipelineResult, Upload
from fedmitr_flwr.pipeline.methods.fedmitr import FEDMITR
from fedmitr_flwr.runs.directory import COLLECTED, RunDirectory
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.stages.feature_prior import feature_prior
from fedmitr_flwr.training.reported import REPORTED

log = logging.getLogger("fedmitr.strategy")

# Seconds by which a train message outlives the deadline. Flower drops an expired message together with its reply.
_TTL_MARGIN = 3600.0


@dataclass(frozen=True)
class RoundOutcome:
    """Outcome of one round.

    Attributes
    ----------
    result
        Result of the pipeline.
    uploads
        The K accepted uploads, in the order in which the pipeline got them.
    clients
        Numbers of clients by outcome.
    """

    result: PipelineResult
    uploads: tuple[StoredUpload, ...]
    clients: ClientCounts

    @property
    def upload_mb(self) -> float:
        """Mean size of the accepted uploads in MB (10^6 bytes)."""
        return sum(upload.megabytes for upload in self.uploads) / len(self.uploads)


class FedMITR(Strategy):
    """One-shot federated learning for Vision Transformers (FedMITR, arXiv 2605.10748).

    The strategy asks every connected client to train once, keeps the uploads that pass validation, and turns them into
    one global model without any data. With several rounds, the global model of a round is the initialisation of the
    next.

    Parameters
    ----------
    settings
        All settings of the run. The clients get them with the train message.
    spec
        Classes, geometry and normalisation of the images.
    run
        Directory of the run, in which uploads and checkpoints are stored.
    device
        Device on which the pipeline runs.
    observer
        Receives the events of collection and pipeline.
    pipeline
        Function that turns uploads into a global model.

    Attributes
    ----------
    outcome
        Outcome of the last finished round; None before the first.
    seconds
        Wall-clock seconds, summed over all rounds. ``collect``: validating and writing uploads. ``clients``: the rest
        of the time from the request to the last reply.
    """

    def __init__(
        self,
        settings: Settings,
        spec: ImageSpec,
        run: RunDirectory,
        *,
        device: torch.device,
        observer: Observer,
        pipeline: Pipeline = FEDMITR,
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
        self._asked = 0
        self._asked_at = 0.0
        self._store: UploadStore | None = None
        self._closed: ClientCounts | None = None

    def summary(self) -> None:
        """Log the strategy's main settings in Flower's style."""
        run, train, inversion = self.settings.run, self.settings.train, self.settings.inversion
        stops = ", ".join(map(str, inversion.stops)) or "none (dense)"
        log.info("\t├──> Method: %s", run.method)
        log.info("\t├──> Quorum: %d uploads, %.0f %% of the asked clients", run.min_clients, 100 * run.min_fraction)
        shared = (_yes(train.share_label_histogram), _yes(train.share_moments))
        log.info("\t├──> Clients: %s weights, histograms %s, moments %s", train.upload_dtype, *shared)
        log.info("\t├──> Ensemble: weights by %s", self.settings.ensemble.weighting)
        log.info("\t├──> Inversion: %d images, %d iterations", inversion.images, inversion.iterations)
        log.info("\t│\t└── Patches are stopped at iterations: %s", stops)
        log.info("\t├──> Distillation: %d steps on %s", self.settings.distill.steps, self.device)
        log.info("\t└──> Code: %s", short(self.digest))

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 1,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds as Flower's ``Strategy.start`` does, but receive the replies one by one (`WindowedGrid`).

        Parameters
        ----------
        timeout
            Seconds to wait for the clients of a round; None: `run.deadline-seconds`.
        """
        run = self.settings.run
        if not isinstance(grid, WindowedGrid):
            grid = WindowedGrid(grid, run)
        timeout = run.deadline_seconds if timeout is None else timeout
        return super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask all connected nodes to train, once at least `run.min-clients` of them are connected.

        In a resumed run, clients whose upload is already stored are not asked again.

        Raises
        ------
        QuorumError
            If too few nodes connect within `run.wait-nodes-seconds`.
        """
        run = self.settings.run
        self._initial = decode_trusted(arrays)
        self._asked, self._asked_at = 0, time.perf_counter()
        self._store = self._open_store(server_round)
        self._closed = closed_collection(self.run.uploads(server_round) / COLLECTED, self._store.uploads())
        if self._closed is not None:
            log.info("configure_train: all uploads of round %d are already stored", server_round)
            return []
        nodes = wait_for_nodes(grid.get_node_ids, run)
        if have := {upload.client for upload in self._store.uploads()}:
            log.info("configure_train: %d uploads are already stored", len(have))
            nodes = nodes_without(have, nodes, grid, run.wait_nodes_seconds + 0.5 * len(nodes))
        shared = {
            **config,
            "digest": self.digest,
            "settings": json.dumps(self.settings.flat()),
            "spec": self.spec.to_json(),
            "round": server_round,
            "initial": self._store.initial,
        }
        sent = {"arrays": arrays, **self._prior(server_round)}
        ttl = run.deadline_seconds + _TTL_MARGIN
        messages = [
            Message(
                RecordDict({**sent, "config": unguessable(shared)}),
                node,
                MessageType.TRAIN,
                ttl=ttl,
                group_id=str(server_round),
            )
            for node in nodes
        ]
        log.info("configure_train: asking %d clients (round %d)", len(messages), server_round)
        log.info("configure_train: %s", self._expected_size(self._store))
        self._asked = len(messages)
        self._asked_at = time.perf_counter()
        self.observer.client("asked", count=len(messages))
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Store the valid uploads and turn them into the global model.

        Parameters
        ----------
        server_round
            Number of the round, counted from 1.
        replies
            Replies of the clients, consumed one by one. Each upload is validated, written to disk and removed from
            memory.

        Returns
        -------
        arrays
            The global model, fp32.
        metrics
            Numbers of clients by outcome, and the means of the numbers that clients report (`training.reported`),
            weighted by numbers of examples.

        Raises
        ------
        QuorumError
            If there are fewer valid uploads than `run.min-clients` and `run.min-fraction` require.
        """
        store, counts = self.collect(server_round, replies)
        check_quorum(counts, self.settings.run)
        uploads = store.uploads()
        if self._closed is None:
            close_collection(self.run.uploads(server_round) / COLLECTED, counts, uploads)
        opened = [
            Upload(store.open(upload), upload.num_examples, upload.histogram, upload.client, store.moments(upload))
            for upload in uploads
        ]
        seed = self.settings.run.seed + server_round - 1
        checkpoints = Checkpoints(self.run.checkpoints(server_round), self.settings.run.checkpoint_seconds)
        inputs = PipelineInputs(
            self.settings, self.spec, opened, self._initial, seed, self.device, self.observer, checkpoints
        )
        result = self.pipeline(inputs)
        self.outcome = RoundOutcome(result, tuple(uploads), counts)
        return encode_state(result.state), _metrics(uploads, counts)

    def collect(self, server_round: int, replies: Iterable[Message]) -> tuple[UploadStore, ClientCounts]:
        """Store the valid uploads of a round; see `collection.Collection`."""
        store = self._store
        assert store is not None  # Flower calls configure_train first
        if self._closed is not None:
            return store, self._closed
        before = len(store.uploads())
        collection = Collection(
            store,
            self.digest,
            histograms=self.settings.train.share_label_histogram,
            roster=self.roster,
            observer=self.observer,
        )
        new = collection.take(replies, self._asked)
        self.seconds["collect"] += collection.working
        self.seconds["clients"] += time.perf_counter() - self._asked_at - collection.working
        counts = replace(new, asked=new.asked + before, accepted=new.accepted + before)
        log.info("collected: %s", counts)
        return store, counts

    def _open_store(self, server_round: int) -> UploadStore:
        """Open the round's directory of uploads, with the uploads that an earlier process of the run stored."""
        store = UploadStore(
            self.run.uploads(server_round),
            self._initial,
            self.spec.num_classes,
            needs_histogram=self.settings.train.share_label_histogram,
            max_update_norm=self.settings.run.max_update_norm,
            needs_moments=self.settings.train.share_moments,
            part=trained_part(self.settings.train, self._initial),
        )
        store.recover()
        return store

    def _prior(self, server_round: int) -> dict[str, ArrayRecord]:
        """Return the record from which the clients start their heads; empty if they start from the initialisation."""
        if self.settings.train.head_start != "discriminant" or server_round > 1:
            return {}
        log.info("configure_train: computing features of random images (train.head-start = discriminant)")
        prior = feature_prior(self.settings, self.spec, self._initial, self.device)
        return {"prior": encode_state(prior.tensors())}

    def _expected_size(self, store: UploadStore) -> str:
        """Return the size of an upload in words, for the log."""
        train = self.settings.train
        megabytes = store.layout.size(train.upload_dtype) / 1e6
        text = f"each client uploads {megabytes:.3g} MB ({KEY} = {train.trainable}"
        if store.part.whole:
            return f"{text})"
        whole = Layout.of(self._initial).size(train.upload_dtype) / 1e6
        return f"{text}; all weights have {whole:.3g} MB)"

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return no messages, because the server evaluates on its own held-out images."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Do nothing, because no client was asked to evaluate."""


def _metrics(uploads: Sequence[StoredUpload], counts: ClientCounts) -> MetricRecord:
    counts_of = bounded_counts(torch.tensor([upload.num_examples for upload in uploads]))
    shares = (counts_of / counts_of.sum()).tolist()
    means = {}
    for number in REPORTED:
        values = [upload.numbers[number.name] for upload in uploads]
        means[f"local-{number.name}"] = sum(value * share for value, share in zip(values, shares, strict=True))
    counted = {f"clients-{name}": number for name, number in counts.as_dict().items()}
    return MetricRecord({**counted, "num-examples": round(float(counts_of.sum())), **means})


def _yes(value: bool) -> str:
    return "shared" if value else "withheld"

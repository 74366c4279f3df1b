"""Turn replies into uploads on disk: validate, write, count and drop them one at a time.

A thread writes an upload while the next reply is received. This keeps one more upload in memory, and no client waits
for the disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedmitr_flwr.data.classes import listed
from fedmitr_flwr.federation.code_digest import short
from fedmitr_flwr.federation.quorum import ClientCounts
from fedmitr_flwr.federation.roster import Roster
from fedmitr_flwr.federation.uploads.moments import decode_moments
from fedmitr_flwr.federation.uploads.records import decode_state, unguessable
from fedmitr_flwr.federation.uploads.store import StoredUpload, UploadStore
from fedmitr_flwr.federation.uploads.validation import UploadRefused, check_name
from fedmitr_flwr.runs.atomic import read_checked_json, write_checked_json
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.runs.process_memory import release_memory
from fedmitr_flwr.training.reported import REPORTED

log = logging.getLogger("fedmitr.collection")


class Collection:
    """Collects the replies of one round.

    Parameters
    ----------
    store
        Validates and keeps the uploads.
    digest
        Digest of the code that clients must run.
    histograms
        Whether clients were asked for their label histogram.
    roster
        Which node may upload under which site's name; with None, every node may use any name.
    observer
        Receives one event for each client; with None, no events are sent.

    Attributes
    ----------
    working
        Seconds spent on validating and writing so far.
    """

    def __init__(
        self,
        store: UploadStore,
        digest: str,
        *,
        histograms: bool,
        roster: Roster | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.store = store
        self.digest = digest
        self.histograms = histograms
        self.roster = roster or Roster("")
        self.observer = observer or Observer()
        self.working = 0.0

    def take(self, replies: Iterable[Message], asked: int) -> ClientCounts:
        """Collect the replies as they arrive and return the counts.

        Parameters
        ----------
        replies
            Replies of nodes that were asked to train.
        asked
            Number of these nodes. Nodes without a reply count as failed.

        Raises
        ------
        OSError
            If an upload cannot be written. Earlier uploads stay on disk.
        """
        tally = {"accepted": 0, "refused": 0, "failed": 0, "empty": 0}
        with ThreadPoolExecutor(1, "collection") as writer:
            storing: Future[str] | None = None
            for reply in replies:
                if storing is not None:
                    tally[storing.result()] += 1
                storing = writer.submit(self._timed, reply)
                del reply  # otherwise this name would hold it while the next reply is received
            if storing is not None:
                tally[storing.result()] += 1
        silent = asked - sum(tally.values())
        if silent > 0:
            log.warning("\t├──! %d clients did not answer before the deadline", silent)
            tally["failed"] += silent
            self.observer.client("silent", count=silent)
        return ClientCounts(asked=asked, **tally)

    def _timed(self, reply: Message) -> str:
        start = time.perf_counter()
        try:
            return self._receive(reply)
        finally:
            release_memory()
            self.working += time.perf_counter() - start

    def _receive(self, reply: Message) -> str:
        """Validate and store one reply; return the name of the count that it belongs to."""
        node = reply.metadata.src_node_id
        if reply.has_error():
            reason = reply.error.reason or ""
            log.warning("\t├──! node %d failed (code %d): %s", node, reply.error.code, failure_reason(reason))
            log.debug("node %d, in full: %s", node, reason[:10_000])
            self.observer.client("failed", client=f"node {node}", reason=failure_reason(reason))
            return "failed"
        try:
            upload = self._accept(reply.content, node)
        except UploadRefused as refusal:
            log.warning("\t├──! upload of node %d refused: %s", node, refusal)
            self.observer.client("refused", client=f"node {node}", reason=str(refusal))
            return "refused"
        except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, AttributeError) as error:
            # A reply that makes the validation itself fail must not end the run: the other uploads would be lost.
            log.warning("\t├──! upload of node %d refused: unreadable (%s)", node, type(error).__name__)
            log.debug("node %d, in full:", node, exc_info=True)
            self.observer.client("refused", client=f"node {node}", reason=f"unreadable ({type(error).__name__})")
            return "refused"
        finally:
            reply.content.clear()  # frees the arrays, because Flower keeps a reference to the message
        if upload is None:
            log.info("\t├──> node %d has no data", node)
            self.observer.client("empty", client=f"node {node}")
            return "empty"
        shown = ", ".join(f"{number.title} {number.text(upload.numbers[number.name])}" for number in REPORTED)
        size = upload.megabytes
        log.info("\t├──> %s: %d images, %s, upload %.3g MB", upload.client, upload.num_examples, shown, size)
        self.observer.client(
            "accepted",
            client=upload.client,
            num_examples=upload.num_examples,
            upload_mb=round(size, 6),
            **upload.numbers,
            histogram=upload.histogram or (),
        )
        return "accepted"

    def _accept(self, content: RecordDict, node: int) -> StoredUpload | None:
        """Validate a reply's records and store the upload; return None if the client has no data."""
        config = content.config_records.get("config", ConfigRecord())
        metrics = content.metric_records.get("metrics", MetricRecord())
        arrays = content.array_records.get("arrays")
        digest = config.get("digest")
        if digest != self.digest:
            raise UploadRefused(f"made by other code: {short(str(digest))}, the server runs {short(self.digest)}")
        # Check the roster first, so that an impostor gets the same error whether or not the real site has uploaded.
        self.roster.check(node, check_name(config.get("client")))
        client = self.store.check_client(config.get("client"))
        num_examples = metrics.get("num-examples")
        if arrays is None:
            if num_examples == 0:
                return None
            raise UploadRefused("has no arrays")
        initial = config.get("initial")
        if not self.store.part.whole and initial != self.store.initial:
            started = f"{short(str(initial))}, this run's are {short(self.store.initial)}"
            raise UploadRefused(f"trained from other initial weights: {started}")
        layout = self.store.moments_layout
        moments = content.array_records.get("moments") if layout else None  # as for the histogram
        return self.store.accept(
            client,
            decode_state(arrays, self.store.layout, config.get("dtype")),
            num_examples=num_examples,
            numbers={number.name: metrics.get(number.name) for number in REPORTED},
            # A histogram that was not asked for is not kept.
            histogram=metrics.get("histogram") if self.histograms else None,
            moments=decode_moments(moments, layout) if layout and moments is not None else None,
        )


def close_collection(path: Path, counts: ClientCounts, uploads: Sequence[StoredUpload]) -> None:
    """Write a file that marks a round's collection as finished, with its counts and the uploads' checksums."""
    write_checked_json(path, {"clients": counts.as_dict(), "uploads": _checksums(uploads)})


def closed_collection(path: Path, uploads: Sequence[StoredUpload]) -> ClientCounts | None:
    """Return the counts of a collection that an earlier process finished, or None if none did.

    Raises
    ------
    DamagedFileError
        If the file is damaged.
    ValueError
        If the uploads on disk differ from those that were collected.
    """
    try:
        closed = read_checked_json(path)
    except FileNotFoundError:
        return None
    found = _checksums(uploads)
    wrong = sorted(name for name in {*closed["uploads"], *found} if closed["uploads"].get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"the uploads beside {path} differ from those that were collected ({listed(wrong)}); restore them from a "
            "copy or start a new run"
        )
    return ClientCounts(**closed["clients"])


def nodes_without(have: Container[str], nodes: Sequence[int], grid: Grid, patience: float) -> list[int]:
    """Return the nodes whose client has not uploaded yet.

    Flower's node ids differ in every run, so each node is asked for the name of its client.

    Parameters
    ----------
    have
        Names of the clients whose upload is on disk.
    nodes
        Ids of the nodes to ask.
    grid
        The grid of the run.
    patience
        Seconds to wait for answers. Nodes that do not answer are returned too.
    """
    done = set()
    messages = [Message(RecordDict({"config": unguessable({})}), node, MessageType.QUERY) for node in nodes]
    for reply in grid.send_and_receive(messages, timeout=patience):
        if not reply.has_error():
            name = reply.content.config_records.get("config", ConfigRecord()).get("client")
            done |= {reply.metadata.src_node_id} if isinstance(name, str) and name in have else set()
    return [node for node in nodes if node not in done]


def _checksums(uploads: Sequence[StoredUpload]) -> dict[str, str]:
    return {upload.client: upload.checksum for upload in uploads}


def failure_reason(text: str) -> str:
    """Return the line of an error reply that names the error.

    It is the first line in replies of our ClientApp, and the last line, after a traceback, in Flower's own.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    own = not lines[0].startswith(("Traceback", "<class"))
    return lines[0 if own else -1][:500]

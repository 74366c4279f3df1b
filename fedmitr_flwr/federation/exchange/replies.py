"""Fetch replies over a network, so that one slow reply does not delay the others.

In a deployment Flower's grid fetches the arrays of a reply one by one, and waits for those that the site has not sent
yet (1.41 and 1.42). If a site dies while it sends, that takes minutes and exceeds any deadline.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait

from flwr.app import Message
from flwr.serverapp import Grid

from fedmitr_flwr.federation.exchange.inflation import ReplyLimits, limited

log = logging.getLogger("fedmitr.exchange")


class Pulls:
    """Fetches replies in threads of their own, and returns to slow ones later.

    Memory holds the replies that are still being fetched and one more.

    Parameters
    ----------
    grid
        The grid of the run. Its `pull_messages` is called from several threads.
    patience
        Seconds to wait for a reply before the next one is fetched.

    Attributes
    ----------
    limits
        Limits of each reply, see `inflation`; None: none.
    """

    def __init__(self, grid: Grid, patience: float = 5.0) -> None:
        self._grid, self._patience = grid, patience
        self._late: dict[str, Future[list[Message]]] = {}
        self.limits: ReplyLimits | None = None

    def look(self, names: Iterable[str], end: float) -> Iterator[Message]:
        """Yield the replies to these messages that have arrived.

        Parameters
        ----------
        names
            Ids of messages.
        end
            Value of `time.monotonic` after which this does not wait.

        Raises
        ------
        MalformedReplyError
            If a site has sent objects that are no message. The reply is gone.
        """
        for name in names:
            pull = self._late.get(name) or self._start(name)
            if name not in self._late:
                wait([pull], max(0.0, min(self._patience, end - time.monotonic())))
            if pull.done():
                self._late.pop(name, None)
                yield from pull.result()
                del pull  # it holds the reply
            elif name not in self._late:
                log.debug("a reply has been arriving for more than %g s; fetching others meanwhile", self._patience)
                self._late[name] = pull

    def _start(self, name: str) -> Future[list[Message]]:
        pull: Future[list[Message]] = Future()
        limits = self.limits

        def work() -> None:
            try:
                with limited(limits):
                    pull.set_result(list(self._grid.pull_messages([name])))
            except BaseException as error:  # raised again in the thread that reads the result
                pull.set_exception(error)

        # A daemon thread, so that the process can end while the thread waits.
        threading.Thread(target=work, name="pull", daemon=True).start()
        return pull

"""Replies over a network, each waited for apart: one that hangs holds up no other.

Flower's grid of a deployment takes a reply's arrays piece by piece, and waits for those that the site has not sent yet
(1.41): after a site that died while it sent, for minutes, and past any deadline.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait

from flwr.app import Message
from flwr.serverapp import Grid

log = logging.getLogger("fedmitr.exchange")


class Pulls:
    """Looks for replies one by one, and goes on to the next when one is there but does not arrive.

    What has not arrived yet is taken at a later look. At most one reply more than those that hang is in memory.

    Parameters
    ----------
    grid
        The grid of the run; its `pull_messages` is called from several threads.
    patience
        Seconds to wait for a reply before the next one gets its turn.
    """

    def __init__(self, grid: Grid, patience: float = 5.0) -> None:
        self._grid, self._patience = grid, patience
        self._late: dict[str, Future[list[Message]]] = {}

    def look(self, names: Iterable[str], end: float) -> Iterator[Message]:
        """Yield the replies to these messages that have come.

        Parameters
        ----------
        names
            Ids of messages.
        end
            Point of `time.monotonic` after which nothing is waited for.
        """
        for name in names:
            pull = self._late.get(name) or self._start(name)
            if name not in self._late:
                wait([pull], max(0.0, min(self._patience, end - time.monotonic())))
            if pull.done():
                self._late.pop(name, None)
                yield from pull.result()
                del pull  # with the reply
            elif name not in self._late:
                log.debug("a reply is on its way for more than %g s, looking for others meanwhile", self._patience)
                self._late[name] = pull

    def _start(self, name: str) -> Future[list[Message]]:
        pull: Future[list[Message]] = Future()

        def work() -> None:
            try:
                pull.set_result(list(self._grid.pull_messages([name])))
            except BaseException as error:  # for the thread that asks for the result
                pull.set_exception(error)

        # A daemon: the process may end while it hangs.
        threading.Thread(target=work, name="pull", daemon=True).start()
        return pull

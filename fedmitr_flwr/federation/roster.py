"""The roster: which node may upload under which site's name.

A reply comes from the node that was asked: the SuperLink gives a message only to the holder of that node's registered
key, and nobody else can guess the message's id (`records.unguessable`). The site's name inside the reply is written by
the site itself. The roster says which name belongs to which node.
"""

from __future__ import annotations

from fedmitr_flwr.federation.uploads.validation import UploadRefused
from fedmitr_flwr.settings import SettingsError

KEY = "run.roster"


class Roster:
    """The sites of a federation, by node id.

    Parameters
    ----------
    text
        ``site=node-id`` pairs separated by commas, as in `run.roster`. If empty, any node may use any name.

    Raises
    ------
    SettingsError
        If a site or a node id occurs twice.
    """

    def __init__(self, text: str) -> None:
        pairs = [(site, int(node)) for site, _, node in (pair.rpartition("=") for pair in text.split(",") if pair)]
        self._sites = {node: site for site, node in pairs}
        if len(self._sites) < len(pairs) or len({site for site, _ in pairs}) < len(pairs):
            raise SettingsError((KEY, text, "must name each site and each node id once"))

    def check(self, node: int, client: str) -> None:
        """Check that a client's name belongs to the node from which it answers.

        Raises
        ------
        UploadRefused
            If the node is not in the roster, or belongs to another site.
        """
        if not self._sites:
            return
        if node not in self._sites:
            raise UploadRefused(f"node {node} is not in {KEY}")
        if self._sites[node] != client:
            raise UploadRefused(f"claims to be {client}, but node {node} is {self._sites[node]} in {KEY}")

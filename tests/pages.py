"""The documentation's fenced code blocks, and the comment above each that says what runs it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCED = re.compile(r"(?:^<!-- (?P<mark>[^\n]*?) -->\n+)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_DEPLOYMENT = "run, deployment: "


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes
    ----------
    page
        File name.
    kind
        Language behind the fence.
    text
        Its lines.
    mark
        ``run``, ``run, integration``, ``run, deployment: NAME`` for one that tests/deployment asks for by that name, or
        ``not run: REASON``.
    """

    page: str
    kind: str
    text: str
    mark: str

    @property
    def name(self) -> str:
        return f"{self.page}: {self.text.strip().splitlines()[0][:60]}"

    @property
    def deployment(self) -> str:
        """The name under which a test of a deployment runs it; empty if none does."""
        return self.mark.removeprefix(_DEPLOYMENT) if self.mark.startswith(_DEPLOYMENT) else ""


def blocks(page: Path) -> list[Block]:
    found = FENCED.finditer(page.read_text("utf-8"))
    return [Block(page.name, each["kind"], each["text"], each["mark"] or "") for each in found]


def documented(name: str, **places: str) -> str:
    """Return the block of docs/deployment.md that has this name, with some words in it replaced.

    Parameters
    ----------
    name
        As in its comment, ``<!-- run, deployment: NAME -->``.
    places
        For each word that must occur what stands in its place.
    """
    (block,) = (block for block in blocks(ROOT / "docs" / "deployment.md") if block.deployment == name)
    text = block.text
    for word, other in places.items():
        assert word in text, f"{word!r} is not in the block {name!r} of docs/deployment.md"
        text = text.replace(word, other)
    return text

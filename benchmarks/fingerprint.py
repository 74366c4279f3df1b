"""Compute a digest of the code that results depend on.

Results are collected over days, and only results of the same computation may share a table. The digest ignores
comments, docstrings, descriptions of settings, and modules on which no result depends, such as commands and reports.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOTS = ("fedmitr_flwr.pipeline.methods", "fedmitr_flwr.data", "fedmitr_flwr.results.evaluate", "benchmarks.federation")
OWN = ("fedmitr_flwr", "benchmarks")
ASIDE = {
    f"fedmitr_flwr.{name}"
    for name in (
        "pipeline.checkpoints",
        "pipeline.progress",
        "runs.atomic",
        "runs.direct_io",
        "runs.observer",
        "runs.process_memory",
        "runs.tensors",
        "settings.recipes",
    )
}
"""Modules that only store or report results, and the recipes: a line has a hash of its settings beside the code's."""
SAME = Path(__file__).parent / "results" / "same-code.json"
"""For each data set, the digests of newer code that gives the results of older code (`benchmarks.same_results`)."""


def results_code(data: str) -> str:
    """Return the digest for new lines of a data set: today's, or an older one with the same results."""
    known = json.loads(SAME.read_text("utf-8")) if SAME.is_file() else {}
    return str(known.get(data, {}).get(fingerprint(), {}).get("as", fingerprint()))


@cache
def fingerprint() -> str:
    """Return twelve hexadecimal digits over all modules that `ROOTS` import, directly or indirectly."""
    digest = hashlib.sha256()
    for name, tree in sorted(reachable().items()):
        digest.update(f"{name}\0{ast.dump(_Bare().visit(tree))}\0".encode())
    return digest.hexdigest()[:12]


def reachable() -> dict[str, ast.Module]:
    """Return the syntax trees of these modules by name."""
    found: dict[str, ast.Module] = {}
    waiting = list(ROOTS)
    while waiting:
        name = waiting.pop()
        path = _path(name)
        if name in found or path is None or name in ASIDE or name in OWN:  # the packages import everything
            continue
        found[name] = ast.parse(path.read_text("utf-8"))
        waiting += [name.rpartition(".")[0], *_imports(found[name])]
    return found


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _path(name: str) -> Path | None:
    """Return the file of a module of ours; None for any other name."""
    if name.split(".")[0] not in OWN:
        return None
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:  # a name in a module
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


class _Bare(ast.NodeTransformer):
    """Remove docstrings and descriptions; comments and layout are not in the tree."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> ast.AST | None:
        return None if node.arg == "description" else self.generic_visit(node)

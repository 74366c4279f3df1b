"""What a result was computed by: a digest of the code behind it that texts don't change.

Results are gathered over days. Those of the same computation may stand in one table; comments, docstrings and
descriptions of settings may change meanwhile, and so may all that no result depends on, such as commands and reports.
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
    )
}
"""Modules that keep results or tell of them."""
SAME = Path(__file__).parent / "results" / "same-code.json"
"""Of each data set, the codes that were shown to compute what older ones had (`benchmarks.same_results`)."""


def results_code(data: str) -> str:
    """What new lines of a data set name: the fingerprint, or the older one that it has been shown to be equal to."""
    known = json.loads(SAME.read_text("utf-8")) if SAME.is_file() else {}
    return str(known.get(data, {}).get(fingerprint(), {}).get("as", fingerprint()))


@cache
def fingerprint() -> str:
    """Twelve hexadecimal digits over the modules that `ROOTS` import, directly or not."""
    digest = hashlib.sha256()
    for name, tree in sorted(reachable().items()):
        digest.update(f"{name}\0{ast.dump(_Bare().visit(tree))}\0".encode())
    return digest.hexdigest()[:12]


def reachable() -> dict[str, ast.Module]:
    """Our modules by name, parsed."""
    found: dict[str, ast.Module] = {}
    waiting = list(ROOTS)
    while waiting:
        name = waiting.pop()
        path = _path(name)
        if name in found or path is None or name in ASIDE or name in OWN:  # a package itself offers everything to users
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
    """The file of one of our modules; None for what is none."""
    if name.split(".")[0] not in OWN:
        return None
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:  # a name in a module
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


class _Bare(ast.NodeTransformer):
    """Takes out docstrings and descriptions; comments and layout are not in the tree."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> ast.AST | None:
        return None if node.arg == "description" else self.generic_visit(node)

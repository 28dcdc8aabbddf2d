"""Size and shape of the package: `make stats` prints them, `--check` fails where a bound is passed."""

from __future__ import annotations

import ast
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "embcache"
MOST_PARAMETERS = 8
GOAL = 27_000  # lines
# Modules that may ask what an object has, how often, and of what.
PROBING = {
    "embcache": 1, "embcache.cli": 1, "embcache.registry": 1,  # a name in a module
    "embcache.backbones.hf_models": 11, "embcache.backbones.timm_models": 6, "embcache.figures.attention": 5,  # of nets
    "embcache.backbones.hub": 1,  # errors of urllib
    "embcache.backbones.weights": 2, "embcache.commands.output": 3,  # a stream; errors of the system
    "embcache.cores": 2, "embcache.data.budget": 3, "embcache.data.formats": 2, "embcache.io": 4,  # os, sys and libc
    "embcache.data.dataset": 1, "embcache.fields": 4, "embcache.probe.schedule": 1, "embcache.probe.stack": 1,
    "embcache.testing": 1,  # fields of dataclasses
    "embcache.data.images": 1, "embcache.probe.heads.solved": 1,  # an image of Pillow, an estimator of scikit-learn
}  # fmt: skip
# Bounds that hold already; a measure without one is only printed.
PROBES = "hasattr and getattr (other than of os, torch, timm, streams and dataclass fields)"
BOUNDS = {
    "lines": 44_195,  # the goal is `GOAL`; what the reach over backbones, runtimes and targets took is in docs/log.md
    "files": 161,
    PROBES: 0,
    "files of more than 600 lines": 0,
    f"functions of more than {MOST_PARAMETERS} parameters": 0,
    "import cycles": 0,
    "duplicate file names": 0,
    "duplicate class names": 0,
    "errors without a code": 0,
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text("utf-8"))
    return found


def imports(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of the package that a module imports when it runs; those for type checkers alone are left out."""
    found: set[str] = set()
    for node in _running(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known or {node.module or ""}
    return (found & known) - {name, "embcache"}


def _running(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _running(child)


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def _doubles(names: list[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def measure() -> dict[str, list[str] | int]:
    """Each measure: a number, or the list of what counts."""
    trees = modules()
    files = [path for path in PACKAGE.rglob("*.py")]
    graph = {name: imports(name, tree, set(trees)) for name, tree in trees.items()}
    nodes = [(name, node) for name, tree in trees.items() for node in ast.walk(tree)]
    wide, classes, bare = [], [], []
    probes: dict[str, list[str]] = {}
    for name, node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _parameters(node) > MOST_PARAMETERS:
            wide.append(f"{name}.{node.name} ({_parameters(node)})")
        elif isinstance(node, ast.ClassDef):
            classes.append(node.name)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("hasattr", "getattr"):
                probes.setdefault(name, []).append(f"{name}:{node.lineno} {ast.unparse(node)[:80]}")
            keys = {keyword.arg for keyword in node.keywords}
            if node.func.id.endswith("Error") and keys & {"fix", "found", "expected", "where"} and "code" not in keys:
                bare.append(f"{name}:{node.lineno}")
    lines = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8").count("\n") for path in files}
    return {
        "lines": sum(lines.values()),
        "files": len(files),
        "files of more than 600 lines": [f"{path} ({count})" for path, count in lines.items() if count > 600],
        f"functions of more than {MOST_PARAMETERS} parameters": wide,
        "import cycles": [" ".join(group) for group in cycles(graph)],
        "duplicate file names": _doubles([path.name for path in files if not path.name.startswith("__")]),
        "duplicate class names": _doubles([name for name in classes if not name.startswith("_")]),
        PROBES: [place for name, places in probes.items() for place in places[PROBING.get(name, 0) :]],
        "errors without a code": bare,
        "lines of tests": sum(path.read_text("utf-8").count("\n") for path in (ROOT / "tests").rglob("*.py")),
    }


def main() -> int:
    """Print the measures, in full with ``--list``; with ``--check`` say which pass their bounds."""
    failed = 0
    for name, found in measure().items():
        count = found if isinstance(found, int) else len(found)
        bound = BOUNDS.get(name)
        late = bound is not None and count > bound
        failed += late
        goal = f"  (the goal: {GOAL:,})" if name == "lines" else ""
        print(f"{count:>7,}  {name}" + (f"  (at most {bound:,})" if late else goal))
        if isinstance(found, list) and ("--list" in sys.argv or late):
            print("\n".join(f"           {each}" for each in found))
    return int(failed > 0 and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())

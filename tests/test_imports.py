"""Imports point one way, and the quick commands stay quick: see the layout in CONTRIBUTING."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import embcache
from embcache.data.dataset import ImageDataset
from tests.probe import build as probe_build
from tests.store.build import add, make_store, make_table
from tools.stats import cycles, imports, modules

PACKAGE = Path(embcache.__file__).parent

# From the bottom to the top: each part may import itself and those of lower rows.
_BASE = (
    "config", "cores", "errors", "fields", "io", "log", "mirror", "notebook", "partitions", "paths", "places",
    "registry", "sealed", "targets",
)  # fmt: skip
LAYERS = (
    _BASE,
    ("backbones", "data", "store", "runs"),
    ("extract",),
    ("probe", "finetune"),
    ("results",),
    ("figures",),
    ("study", "report", "maintain"),
    ("commands",),
    ("cli",),
    ("__main__", "testing"),
)
BESIDE = {("finetune", "probe"), ("backbones", "data")}
FORBIDDEN_MODULES = {
    "data": {"torch", "torchvision", "timm", "matplotlib"},
    "store": {"torch", "torchvision", "timm", "matplotlib"},
    "runs": {"torch", "torchvision", "timm", "matplotlib"},
    "probe": {"timm", "torchvision", "matplotlib", "embcache.data.images", "embcache.extract", "PIL"},
    "extract": {"matplotlib"},
    "finetune": {"matplotlib"},
}


def _imports() -> Iterator[tuple[str, str]]:
    """Every module of the package with each name that it imports, anywhere in it."""
    for module, tree in modules().items():
        for node in ast.walk(tree) if module != "embcache" else ():
            if isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: imports are absolute"
                yield module, node.module or ""
                yield from ((module, f"{node.module}.{alias.name}") for alias in node.names)


def test_imports_point_one_way() -> None:
    height = {name: number for number, names in enumerate(LAYERS) for name in names}
    for module, name in _imports():
        part = module.split(".")[1]
        if name.startswith("embcache."):
            target = name.split(".")[1]
            if ((PACKAGE / target).is_dir() or (PACKAGE / f"{target}.py").is_file()) and part not in _BASE:
                lower = height[target] < height[part] or (part, target) in BESIDE
                assert target == part or lower, f"{module} imports {name}"
            assert part not in _BASE or target in _BASE, f"{module} imports {name}"
        for forbidden in FORBIDDEN_MODULES.get(part, ()):
            assert not f"{name}.".startswith(forbidden + "."), f"{module} imports {name}"


def test_nothing_imports_in_circles() -> None:
    trees = modules()
    assert cycles({name: imports(name, tree, set(trees)) for name, tree in trees.items()}) == []


def test_drawing_libraries_are_imported_in_few_places() -> None:
    importers = {(name.split(".")[0], module.rpartition(".")[2]) for module, name in _imports()}
    assert {module for name, module in importers if name == "matplotlib"} == {"plots"}
    assert {module for name, module in importers if name == "bokeh"} == {"charts"}


# Calls that change a filesystem, however they are spelt: by os, shutil, a Path or the built-in open.
_CHANGING = {
    "chmod", "copy2", "copyfile", "copyfileobj", "copytree", "fsync", "ftruncate", "hardlink_to", "link", "makedirs",
    "mkdir", "mkfifo", "mkstemp", "mkdtemp", "move", "open", "pwrite", "rename", "renames", "removedirs", "rmdir",
    "rmtree", "symlink", "symlink_to", "touch", "truncate", "unlink", "utime", "write_bytes", "write_text",
}  # fmt: skip


_WRITERS = {"create_exclusive", "replace_file", "write_file", "write_tree"}


def test_the_store_writes_to_disk_by_one_module() -> None:
    """`io.py` makes the calls, `commit.py` says what is written and when; every other one only reads."""
    callers, writers = set(), set()
    for path in (PACKAGE / "store").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                texts = [
                    a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)
                ]
                if name in _CHANGING and not (name == "open" and "rb" in texts):
                    callers.add(path.name)
                if name in _WRITERS:
                    writers.add(path.name)
    assert callers == set()
    assert writers == {"commit.py", "lease.py"}


HEAVY = {"torch", "timm", "torchvision", "matplotlib"}


def _imported_by(commands: list[list[str]], status: int | None = 0) -> set[str]:
    """Modules, to the second level, that one process has imported when each command has ended (with ``status``)."""
    script = (
        "import sys, embcache\nassert not {'torch', 'numpy', 'pandas', 'zarr'} & set(sys.modules)\n"
        "from embcache import cli\n"
        f"for words in {commands!r}:\n"
        "    sys.argv[1:] = words\n"
        "    try:\n        status = cli._run()\n"
        "    except SystemExit as end:\n        status = end.code or 0\n"
        f"    assert {status} in (None, status), (words, status)\n"
        "print('imported', *{'.'.join(name.split('.')[:n]) for name in sys.modules for n in (1, 2)})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, *names = done.stdout.splitlines()[-1].split()
    assert said == "imported"
    assert "embcache" in names
    return set(names)


def _put_store(home: Path, root: Path | None) -> None:
    path = make_store(home)
    add(path, 0, ["a", "b"])
    add(path, 1, ["a"])
    table = make_table(["a", "b"]).table.assign(path=["a", "b"], place="")
    ds = ImageDataset("ds", root, ("no", "yes"), "auc", "generic", table)
    (home / "ds" / "dataset.parquet").write_bytes(ds.to_parquet_bytes())


def test_quick_commands_import_no_torch(home: Path) -> None:
    helped = ("extract", "probe", "verify", "gc", "doctor", "report")
    commands = [["--help"], ["ls"], ["datasets"], ["gc"], *([command, "--help"] for command in helped)]
    assert not _imported_by(commands) & (HEAVY | {"bokeh", "jinja2"})
    assert not _imported_by([["results"], ["compare", "a", "b"], ["subgroups", "a"]], None) & HEAVY


def test_listing_and_reading_every_byte_import_no_heavy_package(home: Path) -> None:
    _put_store(home, home)
    heavy = {"pandas", "zarr", "h5py", "sklearn", "scipy", "PIL", "tqdm", "bokeh"}
    assert not _imported_by([["ls"], ["--help"]]) & heavy
    assert not _imported_by([["verify", "--source"], ["verify"], ["gc"]], None) & HEAVY


def test_a_slip_in_the_flags_of_probe_is_told_before_torch_is_imported(home: Path) -> None:
    slips = [
        ["--head", "lineer"], ["--val", "some"], ["--test", "public"], ["--folds", "1"], ["--repeats", "0"],
        ["--views", "0"], ["--lr", "fast"], ["--lr", "-1"], ["--subset", "0"], ["--subset", "1.5"],
        ["--head-option", "k"], ["--backbone", "a,,b"], ["--attention", "wrong", "--head", "dvme"],
        ["--attention", "fast"], ["--attention", ""],
    ]  # fmt: skip
    assert not _imported_by([["probe", *slip] for slip in slips], 2) & {"torch", "pandas", "zarr", "sklearn"}


def test_a_probe_imports_neither_the_compiler_nor_scikit_learn(home: Path) -> None:
    ds = probe_build.make_dataset([0, 1] * 40, split=["train"] * 60 + ["test"] * 20)
    probe_build.put_store(home, ds, "a", probe_build.make_features(ds))
    (home / ds.name / "dataset.parquet").write_bytes(ds.to_parquet_bytes())
    asked = ["probe", "--home", str(home), "--backbone", "a", "--folds", "2", "--subset", "12", "--head"]
    imported = _imported_by([[*asked, "linear"], [*asked, "dvme", "--head-option", "proj_dim=4"]])
    assert "torch" in imported
    assert not imported & {"sklearn", "zarr", "sympy", "torch._dynamo", "torch._inductor"}


def test_every_public_name_resolves() -> None:
    for name in embcache.__all__:
        assert getattr(embcache, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        embcache.nonsense  # noqa: B018

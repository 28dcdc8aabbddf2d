"""Every code block of README and docs runs, page by page, or says visibly what it needs (tests/docs/blocks.py).

Small networks stand for the published ones and small synthetic images for the datasets (stage.py, world.py): what is
tested is that each command and each line of Python works as written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import FILES, RUN, SHOWN, Block, read_blocks
from tests.docs.world import make_world

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
WITH_CODE = [n for n in NAMES if any(b.language in RUN and not b.needs for b in read_blocks(ROOT / n))]

LITES = "effnet_lite0,effnet_lite1,effnet_lite2"
# Commands that the reader of a page has run before, and the IDs that the page shows for their runs.
BEFORE: dict[str, list[tuple[str, str]]] = {
    "docs/index.md": [
        ("", f"extract --backbone random,{LITES} --dataset pneumonia"),
        ("", "extract --backbone random --dataset nih,aptos"),
        ("linear-20-1a2b", "probe --subset 20 --dataset nih --backbone random"),
        ("linear-F-3c4d", "probe --subset F --dataset nih --backbone random"),
        ("linear-F-5e6f", "probe --subset F --dataset aptos --backbone random --test official"),
        ("", f"probe --head dvme --subset S --dataset pneumonia --backbone {LITES}"),
    ],
    "docs/results.md": [
        ("", "extract --backbone dino --dataset nih"),
        ("linear-S-1411", "probe --subset S --dataset nih"),
        ("linear-M-2d45", "probe --subset M --dataset nih --head mlp"),
        ("dvme-S-0ad3", "probe --subset S --dataset nih --head logreg"),
        ("", "extract --backbone effnet_lite0 --dataset pneumonia"),
        ("", "extract --backbone dino --dataset aptos"),
        ("linear-F-0123", "probe --dataset aptos --backbone dino --subset F --test official"),
        ("linear-F-4567", "probe --dataset pneumonia --backbone effnet_lite0 --subset F"),
    ],
    "docs/figures.md": [
        ("", f"extract --backbone random,{LITES} --dataset pneumonia"),
        ("", f"probe --head dvme --subset S --dataset pneumonia --backbone {LITES}"),
    ],
    "docs/report.md": [
        ("", f"extract --backbone random,{LITES} --dataset pneumonia,aptos"),
        ("", f"probe --head dvme --subset S --dataset pneumonia --backbone {LITES}"),
        ("", "probe --subset S,F --dataset pneumonia,aptos --backbone random"),
    ],
    "docs/tables.md": [
        ("", f"extract --backbone random,{LITES} --dataset pneumonia"),
        ("", "probe --subset S,F --dataset pneumonia"),
    ],
}

SHIM = """#!{python} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({path!r})
request = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}
if "EMBCACHE_PAGE" in os.environ:
    request["page"] = os.environ.pop("EMBCACHE_PAGE")
    request["env"].pop("EMBCACHE_PAGE")
socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
sys.exit(int(server.recv(16) or b"1"))
"""


def test_pages_are_found() -> None:
    assert {"README.md", "docs/tutorial.md", "docs/howto/features.md", "docs/results.md"} <= set(WITH_CODE)


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_run_or_says_what_it_needs(name: str) -> None:
    for block in read_blocks(ROOT / name):
        where = f"{name}:{block.line}"
        assert block.language in RUN | FILES | SHOWN, f"{where}: a block without a language that is known here"
        if block.language in SHOWN:
            for line in block.code.splitlines():
                words = line.split()
                assert words[:1] not in (["embcache"], ["$"], ["import"], ["python"]), (
                    f"{where}: commands in a text block"
                )


@pytest.fixture(scope="session")
def stage() -> Iterator[Path]:
    """A folder with the programs ``embcache`` and ``python``, and the process that answers for the first."""
    if sys.platform != "linux" or shutil.which("bash") is None:
        pytest.skip("needs Linux and bash")
    folder = Path(tempfile.mkdtemp(prefix="embcache-docs-"))  # a socket's path must be short
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.docs.stage", str(folder / "socket")]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            (folder / "embcache").write_text(SHIM.format(python=sys.executable, path=str(folder / "socket")))
            (folder / "embcache").chmod(0o755)
            for program in ("python", "python3"):
                (folder / program).write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
                (folder / program).chmod(0o755)
            yield folder
        finally:
            server.terminate()
            shutil.rmtree(folder, ignore_errors=True)


Perform = Callable[..., str]


@pytest.fixture
def perform(stage: Path, tmp_path: Path) -> Perform:
    """Run a command of ``embcache`` in a folder of its own; with ``page`` the blocks in that file instead."""
    make_world(tmp_path)
    environment = {
        "PATH": f"{stage}:{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8",
        "EMBCACHE_HOME": str(tmp_path / "home"), "EMBCACHE_WEIGHTS": str(tmp_path / "weights"),
        "EMBCACHE_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip

    def perform(*arguments: str, page: Path | None = None) -> str:
        more = {} if page is None else {"EMBCACHE_PAGE": str(page)}
        done = subprocess.run(
            [str(stage / "embcache"), *arguments], cwd=tmp_path, env={**environment, **more}, timeout=300,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, errors="replace",
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(arguments)} ended with {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    return perform


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CODE)
def test_the_blocks_of_a_page_run(name: str, perform: Perform, tmp_path: Path) -> None:
    ids, answer, page = {}, tmp_path / "answer.json", tmp_path / "blocks.json"
    for shown, arguments in BEFORE.get(name, ()):
        perform(*arguments.split(), "--json", str(answer))
        if shown:
            ids[shown] = json.loads(answer.read_text("utf-8"))[0]["id"]
    blocks = [b for b in read_blocks(ROOT / name) if not b.needs and (b.file or b.language in RUN)]
    page.write_text(json.dumps([_as_data(name, block, ids) for block in blocks]), "utf-8")
    shown = perform(page=page)
    for block in blocks:
        assert block.file or f"--- {name}:{block.line}" in shown


@pytest.mark.parametrize("block", ["```python\nprint(1 / 0)\n```", "```bash\nembcache info --dataset none\ntrue\n```"])
def test_a_block_that_fails_is_named(block: str, perform: Perform, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"# A page\n\n{block}\n", "utf-8")
    page = tmp_path / "blocks.json"
    page.write_text(json.dumps([_as_data("page.md", b, {}) for b in read_blocks(tmp_path / "page.md")]), "utf-8")
    with pytest.raises(AssertionError, match=r"page\.md"):
        perform(page=page)


def _as_data(name: str, block: Block, ids: dict[str, str]) -> dict[str, object]:
    code = block.code
    for shown, real in ids.items():
        code = code.replace(shown, real)
    return {"page": name, "line": block.line, "language": block.language, "code": code, "file": block.file}

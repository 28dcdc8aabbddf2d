"""The command line as a user meets it: one message for each mistake, the promised exit status, data as JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embcache.cli import COMMANDS, app
from tests.commands.test_output import command
from tests.extract.conftest import draw


def embcache(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "embcache", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders of 2 × 15 small images."""
    root = tmp_path / "mine"
    for index in range(30):
        draw(root / ("a" if index % 2 else "b") / f"{index:02}.png", index, size=32)
    return root


def test_help_has_every_command_under_a_heading_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for heading, commands in COMMANDS.items():
        assert f"{heading}:" in lines
        for name, (_, sentence) in commands.items():
            assert sentence[0].isupper()
            assert sentence.endswith(".")
            assert any(line.startswith(f"  {name} ") for line in lines)


def test_options_stand_under_the_headings_of_their_configs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app(["finetune", "--help"])
    text = capsys.readouterr().out
    places = [text.index(f"{heading}:") for heading in ("Protocol options", "Finetuning options", "Dataset options")]
    assert places == sorted(places)
    assert text.index("--folds") < places[1] < text.index("--max-pixels") < places[2] < text.index("--data-root")
    assert "[default: 1e-3; with dino 1e-4]" in " ".join(text.split())


def test_help_imports_no_command_and_nothing_heavy(home: Path) -> None:
    script = (
        "import sys\nfrom embcache.cli import app\ntry:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'pandas', 'rich', 'tqdm', 'pydantic', 'embcache.config'} & set(sys.modules)\n"
        "heavy |= {name for name in sys.modules if name.startswith('embcache.') and name.endswith('_command')}\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(home: Path) -> None:
    assert embcache("--version").stdout.startswith("embcache 0.")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nonsense"], 2, ["nonsense"]),
        (["extract"], 2, ["backbone", "embcache backbones"]),
        (["extract", "--backbone", "random"], 2, ["dataset", "embcache datasets"]),
        (["extract", "--backbone", "dinno", "--dataset", "sample"], 2, ["dinno", "dino"]),
        (["extract", "--backbone", "random,,dino", "--dataset", "sample"], 2, ["empty name"]),
        (["extract", "--backbone", "random", "--dataset", "pneumonia"], 1, ["pneumonia", "kagglehub"]),
        (["extract", "--backbone", "random", "--dataset", "nonsense"], 1, ["nonsense", "embcache datasets"]),
        (["extract", "--backbone", "random", "--dataset", "folder"], 2, ["--data-root"]),
        (["extract", "--backbone", "random", "--dataset", "sample", "--part", "x"], 2, ["--part"]),
        (["finetune", "--dataset", "sample", "--backbone", "random", "--folds", "1"], 2, ["--folds is out of bounds"]),
        (["probe", "--dataset", "sample"], 1, ["embcache extract"]),
        (["probe", "--head", "liner"], 2, ["liner", "linear"]),
    ],
)
def test_each_mistake_gets_one_message(
    home: Path, arguments: list[str], status: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out, err = command(arguments, "utf-8", monkeypatch)
    assert (found, out) == (status, ""), err
    for word in words:
        assert word in err


@pytest.mark.skipif(sys.platform != "linux", reason="needs a shell and /dev/full")
@pytest.mark.parametrize(
    ("target", "statuses"),
    [(">&-", (0,)), ("> /dev/full", (1,)), ("| true; exit ${PIPESTATUS[0]}", (0, 1))],
    ids=["closed", "full", "reader gone"],
)
def test_output_that_cannot_be_written_leaves_no_traceback(home: Path, target: str, statuses: tuple[int, ...]) -> None:
    line = f"{sys.executable} -m embcache datasets {target}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode in statuses, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_extract_then_probe_a_folder(folder: Path, home: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", "folder", "--data-root", str(folder)]
    first = embcache("extract", "--backbone", "random", *arguments, "--json", "-")
    assert first.returncode == 0, first.stderr
    (extraction,) = json.loads(first.stdout)
    assert (extraction["computed"], extraction["cached"], extraction["quarantined"]) == (30, 0, {})
    assert embcache("ls").stdout.count("random") == 1
    target = tmp_path / "results.json"
    done = embcache("probe", "--head", "linear", "--subset", "10,F", *arguments, "--json", str(target))
    assert done.returncode == 0, done.stderr
    results = json.loads(target.read_text())
    assert results[0]["n_train"] == 10
    assert all(0 <= result["mean"] <= 1 and len(result["folds"]) == 5 for result in results)
    assert "linear" in done.stdout


def test_probing_works_with_the_images_gone(folder: Path, home: Path) -> None:
    arguments = ["--dataset", "folder", "--data-root", str(folder)]
    name = json.loads(embcache("extract", "--backbone", "random", *arguments, "--json", "-").stdout)[0]["dataset"]
    live = json.loads(embcache("probe", "--subset", "10", "--dataset", name, "--json", "-").stdout)
    folder.rename(folder.with_name("elsewhere"))
    gone = embcache("probe", "--subset", "10", "--dataset", name, "--json", "-")
    assert gone.returncode == 0, gone.stderr
    assert json.loads(gone.stdout)[0]["mean"] == live[0]["mean"]
    assert json.loads(gone.stdout)[0]["source"] == "snapshot"


def _heed_interrupts() -> None:
    """A shell's background jobs, and their children, are started with interrupts ignored; a person's command is not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_that_can_go_on(folder: Path, home: Path, number: int, status: int) -> None:
    for index in range(30, 60):
        draw(folder / "a" / f"{index}.png", index, size=96)
    for path in folder.rglob("*.png"):
        draw(path, int(path.stem), size=96)
    words = f"{sys.executable} -m embcache extract --backbone random --dataset folder --rows-per-shard 8 --data-root"
    process = subprocess.Popen(
        [*words.split(), str(folder)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_interrupts,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(home.glob("*/random-*/plan/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    assert "Traceback" not in stderr
    assert "continues from there" in stderr
    done = embcache("extract", "--backbone", "random", "--dataset", "folder", "--data-root", str(folder), "--json", "-")
    assert done.returncode == 0, done.stderr

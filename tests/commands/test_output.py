"""What is printed: in any encoding, to any stream, with nothing in it that a terminal would obey."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embcache import cli
from embcache.commands import output
from embcache.commands.output import Screen, echo, echo_data, fit_table, json_text, print_note
from embcache.data.dataset import load_dataset
from embcache.errors import DatasetNotFoundError, UsageError
from embcache.probe.probe import probe_features
from tests.commands.shell import embcache
from tests.extract.conftest import draw
from tests.probe.build import make_dataset, make_features, put_store

HOSTILE = "\x1b[31mred\u202e\x9b2J\x07 = [x](http://y.example) 網é"
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
ENCODINGS = ("ascii", "latin-1", "cp1252", "utf-8")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_screen_shows_what_its_encoding_lacks_and_what_a_terminal_would_obey(encoding: str) -> None:
    raw = io.BytesIO()
    screen = Screen(io.TextIOWrapper(raw, encoding=encoding, newline=""))
    screen.write(f"a\r{HOSTILE}\n")
    screen.write("\r 50%")  # as a progress bar goes back to the beginning of its line
    screen.flush()
    shown = raw.getvalue().decode(encoding)
    assert not OBEYED.search(shown.replace("\r 50%", ""))
    assert shown.startswith("a\\r\\x1b[31mred\\u202e\\x9b2J\\x07 = [x]")
    assert shown.endswith("\n\r 50%")
    assert ("網" in shown) == (encoding == "utf-8")
    assert ("é" in shown) == (encoding != "ascii")
    assert screen.lost is None


def test_notes_show_control_characters_escaped_and_keep_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_note("left out: a\x1b[2Jb\r\nsecond\u202e line")
    assert capsys.readouterr() == ("", "note: left out: a\\x1b[2Jb\\r\nsecond\\u202e line\n")


HEADERS = ["dataset", "head", "mean", "options", "run"]
ROWS = [
    ["toy", "linear", 0.5, "a long text of several words", "linear-S-0123"],
    ["", "  ensemble", 0.75, "", ""],
    ["toy", "knn", 0.25, "", "knn-S-4567"],
]


def test_tables_fit_the_terminal() -> None:
    wide = fit_table(HEADERS, ROWS, 120).splitlines()
    assert wide[:3] == ["dataset: toy", "", "head        mean  options                       run"]
    narrow = fit_table(HEADERS, ROWS, 48)
    assert max(map(len, narrow.splitlines())) <= 48
    assert "several words" in narrow
    tiny = fit_table(HEADERS, ROWS, 32)
    assert max(map(len, tiny.splitlines()[:-1])) <= 32
    assert "knn-S-4567" in tiny
    assert tiny.splitlines()[-1] == "· not shown: options (--wide shows all columns)"
    assert "not shown" not in fit_table(HEADERS, ROWS, 32, drop=False)


def test_a_single_row_that_does_not_fit_is_one_line_per_column() -> None:
    assert fit_table(HEADERS, ROWS[:1], 30).splitlines() == [
        "dataset  toy", "head     linear", "mean     0.5", "options  a long text of several words",
        "run      linear-S-0123",
    ]  # fmt: skip


class Full(io.StringIO):
    """A disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_output_that_nobody_takes_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    full, nowhere, err = Screen(Full()), Screen(None), io.StringIO()
    for screen in (full, nowhere):
        screen.write("x")
        screen.write("y")
        screen.flush()
        assert not screen.isatty()
        with pytest.raises(TypeError):
            screen.write(b"")  # type: ignore[arg-type]  # which click would else take for a stream of bytes
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "stdout", nowhere)
    assert not output.lost_output()  # who closes it asks for nothing
    monkeypatch.setattr(sys, "stdout", full)
    assert output.lost_output()
    assert err.getvalue() == "embcache: not all of the output could be written: No space left on device\n"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_is_the_same_data_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Screen(io.TextIOWrapper(raw, encoding=encoding)))
    data = {"name": HOSTILE, "surrogate": "\udcff", "astral": "\U000e0001\U0001f600"}
    echo(json_text(data, shown=True), nl=False)
    text = raw.getvalue().decode(encoding)
    assert json.loads(text) == data
    assert not OBEYED.search(text)


def test_data_on_stdout_that_had_to_be_escaped_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    echo_data("id\nplain é\n", "--output FILE")
    assert capsys.readouterr() == ("id\nplain é\n", "")
    echo_data("id\n\x1b\n", "--output FILE")
    shown = capsys.readouterr()
    assert shown.out == "id\n\\x1b\n"
    assert "--output FILE keeps them" in shown.err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    home = tmp_path_factory.mktemp("made") / "home"
    ds = make_dataset(np.tile([0, 1], 60), split=["train"] * 80 + ["test"] * 40)
    ds = replace(ds, class_names=("plain", HOSTILE), notes=(f"a note of {HOSTILE}",))
    ds.table["id"] = [f"{HOSTILE}{k}" for k in range(120)]
    ds.table["site"] = [f"{HOSTILE}{k % 2}" for k in range(120)]
    put_store(home, ds, "net", make_features(ds, shift=0.5), bad={f"{HOSTILE}3": f"broken {HOSTILE}"})
    return home, probe_features(ds, "net", folds=2, subset=20, home=home).id


@pytest.fixture
def run(made: tuple[Path, str], home: Path) -> str:
    """A run over a dataset whose classes, ids and groups have hostile names."""
    shutil.copytree(made[0], home)
    return made[1]


def command(words: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command in this process, its streams in an encoding."""
    raws = io.BytesIO(), io.BytesIO()
    for name, raw in zip(("stdout", "stderr"), raws, strict=True):
        monkeypatch.setattr(sys, name, Screen(io.TextIOWrapper(raw, encoding=encoding, newline="")))
    monkeypatch.setattr(sys, "argv", ["embcache", *words])
    try:
        status: object = cli._run()
    except SystemExit as end:
        status = end.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    assert isinstance(status, int)
    return status, *(raw.getvalue().decode(encoding) for raw in raws)


FAMILIES = (
    "ls", "info --dataset toy", "results", "verify", "gc", "heads", "backbones", "datasets", "results RUN",
    "errors RUN", "compare RUN RUN", "subgroups RUN --by site", "splits export --dataset toy --subset 20 --folds 2",
    "curves", "ls --json -", "curves --format csv", "curves --format latex", "--help", "extract --help",
    f"probe --dataset {HOSTILE.split()[0]}", "audit --dataset toy", "neighbors --dataset toy",
)  # fmt: skip


def test_every_family_of_commands_prints_in_any_encoding_and_width(
    run: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, words in enumerate(line.split() for line in FAMILIES):
        encoding, columns = ENCODINGS[number % 4], ("0", "1", "20", "80")[number // 4 % 4]
        monkeypatch.setenv("COLUMNS", columns)
        status, out, err = command([run if word == "RUN" else word for word in words], encoding, monkeypatch)
        assert not OBEYED.search(out + err), words
        assert "Traceback" not in err
        assert status in (0, 1, 2), (words, err)
        assert out or status, words


@pytest.mark.skipif(sys.platform != "linux", reason="needs a shell and /dev/full")
def test_closed_and_full_streams_end_no_work(home: Path, tmp_path: Path) -> None:
    for index in range(4):
        draw(tmp_path / "images" / "ab"[index % 2] / f"{index}.png", index)
    extract = f"extract --backbone random --dataset folder --data-root {tmp_path / 'images'}"
    line = f"{sys.executable} -m tests.extract.tiny_run {extract} 2>&- <&- >/dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert len(list(home.glob("*/random-*/shards/*"))) == 1


def test_a_descriptor_that_is_closed_is_not_given_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import os, sys\nfrom embcache.commands.output import guard_streams\n"
        "os.close(2); os.close(0)\nsys.stderr = None\n"
        "guard_streams()\nfile = open(os.devnull)\nprint(file.fileno() > 2, file=sys.stdout)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "True\n"


def test_a_suffix_that_says_something_else_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in (
        "curves --output x.png", "curves --format latex --output x.md", "curves --figure x.md", "ls --json x.csv",
        "audit --dataset d --output x.json", "splits export --dataset toy --output x.csv", "tsne --output x.csv",
        "predict --run r x.png --output x.png", "predict --run r --by-group x.json", "submit --run r --output x.csv",
        "export-head --run r --output x.safetensors", "report --output x.pdf",
    ):  # fmt: skip
        with pytest.raises(UsageError) as caught:
            embcache(*line.split())
        assert caught.value.code in ("output-suffix", "other-suffix", "figure-format"), line
    assert not list(tmp_path.glob("x.*"))


def test_an_export_under_another_suffix_is_refused(run: str, home: Path, tmp_path: Path) -> None:
    from embcache.maintain.export import export_features
    from embcache.store.feature_store import open_store

    ds = load_dataset("toy", home=home)
    for name in ("x.png", "x.npz"):
        with pytest.raises(UsageError, match="suffix"):
            export_features(open_store("net", ds, home), ds, tmp_path / name, format="csv")
    export_features(open_store("net", ds, home), ds, tmp_path / "bare", format="csv")


def test_a_cached_dataset_loads_by_its_name_and_a_slip_names_it(run: str, home: Path) -> None:
    assert load_dataset("toy").table["id"].tolist()[0] == f"{HOSTILE}0"
    for slip in ("tpy", "tooy"):
        with pytest.raises(DatasetNotFoundError, match="near to it: toy"):
            load_dataset(slip)


def test_commands_to_go_on_with_bear_home_and_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embcache.store.feature_store import extract_command

    draw(tmp_path / "my images" / "a" / "0.png", 0)
    draw(tmp_path / "my images" / "b" / "1.png", 1)
    ds = load_dataset("folder", tmp_path / "my images", name="mine")
    expected = f"--dataset folder --data-root '{tmp_path / 'my images'}' --name mine --home '/h o'"
    assert extract_command("net", ds, Path("/h o")) == f"embcache extract --backbone net {expected}"
    table = tmp_path / "my images" / "t.csv"
    table.write_text("path,label,who is it\na/0.png,a,x\nb/1.png,b,y\n")
    ds = load_dataset("folder", table, name="mine", group_column="who is it")
    assert extract_command("net", ds).endswith(f"--data-root '{table}' --name mine --group-column 'who is it'")


def test_csv_is_the_table_alone(run: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, err = command(["results", "--csv"], "utf-8", monkeypatch)
    header, *rows = csv.reader(io.StringIO(out))
    assert status == 0
    assert rows[0][header.index("run")] == run
    assert all(len(row) == len(header) for row in rows)
    assert all(row[header.index(name)] for row in rows for name in ("dataset", "backbone", "head", "scored", "run"))
    assert "·" in err
    assert "·" not in out.replace("95 %", "")


def test_notes_follow_quiet_and_verbose(run: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["splits", "export", "--dataset", "toy", "--subset", "20", "--folds", "2"]
    for flag, shown in (("--quiet", False), ("--verbose", True)):
        assert ("note: labels and groups" in command([flag, *words], "utf-8", monkeypatch)[2]) == shown


def test_a_listing_of_nothing_names_what_may_be_meant(run: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ls", "results"):
        assert "near to toi: toy" in command([name, "--dataset", "toi"], "utf-8", monkeypatch)[1]


def test_an_interrupt_while_modules_are_imported_leaves_no_traceback() -> None:
    script = (
        "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'embcache.cli': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\nfrom embcache.__main__ import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")

"""The command line as a user meets it: one message for each mistake, the promised exit status, data as JSON."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.main import get_command

import embcache as package
from embcache.cli import COMMANDS, app
from embcache.commands.features import _print
from embcache.errors import DatasetError, EmbcacheError, ProtocolError, UsageError, advise_only, with_home
from embcache.extract.extract import Extraction
from embcache.store.feature_store import list_stores
from tests.commands.shell import answer, embcache
from tests.commands.test_output import command
from tests.data.pictures import write_image
from tests.docs.test_commands import COMMANDS as LEAVES
from tests.extract.tiny import load_tiny
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused
from tools.stats import modules


@pytest.fixture
def labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of small images with columns, beside folders of classes; every network is tiny."""
    monkeypatch.setattr("embcache.extract.recipes.load_backbone", load_tiny)
    rows = []
    for i in range(40):
        write_image(tmp_path / "mine" / f"{i}.png", i, (24, 24))
        write_image(tmp_path / "classes" / "ab"[i % 2] / f"{i}.png", i, (8, 8))
        rows.append((f"{i}.png", ("Sick", "sick", "well")[i % 3], f"p{i // 2}", f"s{i % 20}", ("x", "y")[i % 2]))
    frame = pd.DataFrame(rows, columns=["file", "finding", "patient", "slide", "marker"])
    frame.to_csv(tmp_path / "mine" / "labels.csv", index=False)
    return tmp_path / "mine" / "labels.csv"


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


@pytest.mark.parametrize("path", LEAVES)
def test_arguments_and_options_are_named_plainly(path: str) -> None:
    text = embcache(*path.split()[1:], "--help").stdout
    assert not re.search(r"[{}]|\[\[|<(str|path|list)|x>=|…\]\.", text.replace("{0", "")), text


def test_options_stand_under_the_headings_of_their_configs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app(["finetune", "--help"])
    text = capsys.readouterr().out
    places = [text.index(f"{heading}:") for heading in ("Finetuning options", "Protocol options", "Dataset options")]
    assert places == sorted(places)
    assert text.index("--max-pixels") < places[1] < text.index("--folds") < places[2] < text.index("--data-root")
    assert "[default: 1e-3; with dino 1e-4]" in " ".join(text.split())


def test_commands_that_load_a_dataset_take_columns() -> None:
    loading = [
        "datasets", "extract", "probe", "finetune", "rank", "similarity", "tsne", "neighbors", "audit", "run", "export",
        "predict", "splits export", "splits import",
    ]  # fmt: skip
    for name in loading:
        flags = {flag for option in LEAVES[f"embcache {name}"].params for flag in option.opts}
        assert {f"--{role}-column" for role in ("path", "label", "group", "split", "id")} <= flags, name


def test_help_imports_no_command_and_nothing_heavy() -> None:
    script = (
        "import sys\nfrom embcache.cli import app\ntry:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'pandas', 'rich', 'tqdm', 'embcache.config', 'embcache.commands.options'}\n"
        "sys.exit(str(heavy & set(sys.modules) or 0))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == "0\n"
    script = "import embcache.__main__ as main, sys; sys.argv[1:] = ['--version']; main.main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"embcache {package.__version__}\n"


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("nonsense", 2, ["nonsense"]),
        ("extract", 2, ["backbone", "embcache backbones"]),
        ("extract --backbone random", 2, ["dataset", "embcache datasets"]),
        ("extract --backbone dinno --dataset folder --data-root ../classes", 2, ["dinno", "dino"]),
        ("extract --backbone random,,dino --dataset folder", 2, ["empty name"]),
        ("extract --backbone random --dataset pneumonia", 1, ["pneumonia", "kagglehub"]),
        ("extract --backbone random --dataset nonsense", 1, ["nonsense", "embcache datasets"]),
        ("extract --backbone random --dataset folder", 2, ["--data-root"]),
        ("extract --backbone random --dataset folder --part x", 2, ["--part"]),
        ("finetune --dataset folder --backbone random --folds 1", 2, ["--folds is out of bounds"]),
        ("probe", 1, ["embcache extract"]),
        ("probe --head liner", 2, ["liner", "linear"]),
        ("datasets --group-column x", 2, ["belong to one dataset"]),
    ],
)
def test_each_mistake_gets_one_message(
    home: Path, labels: Path, line: str, status: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(labels.parent)
    found, out, err = command(line.split(), "utf-8", monkeypatch)
    assert (found, out) == (status, ""), err
    for word in words:
        assert word in err


@pytest.mark.skipif(sys.platform != "linux", reason="needs a shell and /dev/full")
@pytest.mark.parametrize(("images", "said"), [(5, True), (3, False), (2, False)])
def test_what_other_processes_computed_is_named(
    images: int, said: bool, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset([0, 1] * 3)
    put_store(home, dataset, "random", make_features(dataset))
    (store,) = list_stores(home)
    done = Extraction("random", store, 2, 1, 3, 0, 0, left=0, undone=0, quarantined={}, seconds=0.1)
    _print(images, [done])  # of two images, one row is of an image that left the dataset
    assert ("2 images were computed by other processes" in capsys.readouterr().out) == said


def test_output_that_cannot_be_written_leaves_no_traceback(home: Path) -> None:
    lines = {
        ">&-": {0}, "> /dev/full": {1}, "| true; exit ${PIPESTATUS[0]}": {0, 1},
    }  # fmt: skip
    for target, statuses in lines.items():
        line = f"{sys.executable} -m embcache ls {target}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode in statuses, done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr


def test_columns_are_remembered_and_probing_works_with_the_images_gone(labels: Path, home: Path) -> None:
    root = ("--data-root", labels)
    with refused(DatasetError, "columns-ambiguous"):
        embcache("datasets", "folder", *root)
    with refused(DatasetError, "classes-differ-in-case"):
        embcache("datasets", "folder", *root, "--group-column", "slide")
    columns = ("--group-column", "Slide", "--merge-class", "Sick+sick=sick")
    shown = answer("datasets", "folder", *root, *columns)
    assert list(shown["classes"]) == ["sick", "well"]
    assert shown["groups"] == {"train": 20}
    words = embcache("datasets", "folder", *root, *columns).stderr.splitlines()[-1]
    assert words.startswith("next: embcache extract --backbone effnet_lite0 --dataset folder --data-root")
    done = embcache("extract", "--backbone", "random", "--dataset", "folder", *root, *columns, "--name", "mine")
    assert "40" in done.stdout
    assert done.stderr.splitlines()[-1] == "next: embcache probe --head linear --subset S,M,F --dataset mine"
    assert "next" not in embcache("--quiet", "ls").stderr
    assert answer("datasets", "mine")["groups"] == {"train": 20}
    with refused(UsageError, "too-few-classes"):
        embcache("extract", "--backbone", "random", "--dataset", "mine", "--merge-class", "sick+well=x")
    probe = ("probe", "--dataset", "mine", "--subset", "F", "--folds", "2")
    (other,) = answer(*probe, "--group-column", "patient")
    (result,) = answer(*probe)
    for each, column in ((result, "slide"), (other, "patient")):
        assert any(f"column '{column}' (20 groups)" in note for note in each["notes"])
    assert other["id"] != result["id"]
    labels.parent.rename(labels.parent.with_name("elsewhere"))
    (gone,) = answer(*probe, "--again")
    assert (gone["mean"], gone["source"], len(gone["folds"])) == (result["mean"], "snapshot", 2)
    assert embcache(*probe).stderr.splitlines()[-1] == f"next: embcache results {gone['id']}"


def literal_commands() -> list[tuple[str, str]]:
    """Every ``embcache COMMAND …`` in the package's messages, with where it stands."""
    found = []
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "fix":
                text = ast.unparse(node.value)
                found += [(f"{module}:{node.value.lineno}", part) for part in text.split("embcache ")[1:]]
    return found


def test_commands_that_are_advised_exist_with_their_flags() -> None:
    known, todo = dict[str, set[str]](), list(vars(get_command(app))["commands"].items())
    for name, found in todo:
        todo += [(f"{name} {inner}", each) for inner, each in getattr(found, "commands", {}).items()]
        known[name] = {flag for option in found.params for flag in (*option.opts, *option.secondary_opts)}
    checked = 0
    for where, text in literal_commands():
        words = re.findall(r"[a-z-]+", text)
        name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0] if words else ""
        if name not in known:  # a command that is put in by a variable
            continue
        own = re.split(r", or |; |\(|without |, with |by hand", text)[0]
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", own))
        assert flags <= known[name], f"{where}: embcache {text}"
        checked += 1
    assert checked > 50


def test_advice_to_other_flags_is_left_out() -> None:
    assert UsageError("no", fix=("--this", "that")).fix == "--this, or that"
    advise_only({"--this"})
    try:
        error = UsageError("no", fix=("--that 3", "--this", "embcache other --that", "look"))
        assert error.fix == "--this, or embcache other --that, or look"
        assert "try" not in str(UsageError("no", fix="--that"))
    finally:
        advise_only(None)


@pytest.mark.parametrize("typed", [["--home", "{}"], ["--home={}"], ["--cache-dir", "c d", "--home", "{}"]])
def test_advice_goes_to_the_home_that_was_typed(typed: list[str], tmp_path: Path) -> None:
    home = tmp_path / "a home"
    words = [word.replace("{}", str(home)) for word in typed]
    with pytest.raises(EmbcacheError) as caught:
        embcache("results", "zz", *words)
    cache = " --cache-dir 'c d'" if "c d" in typed else ""
    assert caught.value.fix == f"embcache results --home '{home}'{cache}"
    assert f"try: embcache demo --home '{home}'" in embcache("ls", *words).output
    assert UsageError("no", fix="embcache results").fix == "embcache results"  # of another command line


@pytest.mark.parametrize("address", ["s3://bucket//lab", "http://127.0.0.1:5/lab", "S3://bucket/lab"])
def test_an_address_that_means_another_place_is_refused_as_it_was_typed(address: str) -> None:
    with refused(UsageError, "place-address") as caught:
        embcache("ls", "--home", address)
    assert caught.value.found == address


def test_only_commands_that_lack_it_get_the_home() -> None:
    advise_only(None, {"--home": "--home X"}, ["ls", "results", "splits export"])
    try:
        assert with_home("embcache ls --dataset d, or `embcache results`: see") == (
            "embcache ls --home X --dataset d, or `embcache results --home X`: see"
        )
        assert with_home("embcache splits export D") == "embcache splits export --home X D"
        for plain in ("embcache ls --home Y", "embcache heads", "embcache lsx", "another embcache"):
            assert with_home(plain) == plain
    finally:
        advise_only(None)


@pytest.mark.parametrize("words", ["probe", "splits export"])
def test_a_rare_class_is_refused_with_what_the_command_can_do(home: Path, words: str) -> None:
    ds = make_dataset([0, 1] * 40 + [2] * 3)
    put_store(home, ds, "a", make_features(ds))
    with pytest.raises(ProtocolError) as caught:
        embcache(*words.split(), "--dataset", "toy")
    for advice in ("--folds", "--drop-class c", "--merge-class c+OTHER=NEW"):
        assert advice in str(caught.value.fix)
    embcache(*words.split(), "--dataset", "toy", "--drop-class", "c")
    assert UsageError("no", fix="--that").fix == "--that"  # the command is over

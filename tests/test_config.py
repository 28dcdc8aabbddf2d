"""One field of a config is one option of the command line, one keyword, one key of JSON, one part of a run's ID."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from embcache.commands.options import Answer, Skip, command
from embcache.config import DatasetRef, ExtractConfig, FinetuneConfig, MapConfig, ProbeConfig
from embcache.errors import UsageError
from embcache.fields import Config, option, option_of, parse_weights
from tests.refusal import refused

CONFIGS = (DatasetRef, ExtractConfig, ProbeConfig, FinetuneConfig)


@pytest.mark.parametrize("kind", CONFIGS)
def test_json_reads_back(kind: type[Config]) -> None:
    assert kind.from_json(kind().to_json()) == kind()


def test_a_default_is_no_part_of_an_id() -> None:
    assert ProbeConfig().result_options() == {}
    assert ProbeConfig(folds=3, device="cuda", lr=[1e-3, 1e-4]).result_options() == {"folds": 3, "lr": [1e-3, 1e-4]}


NO_RESULT = {"device", "again", "save", "workers", "pixel_cache", "models", "resume"}


@pytest.mark.parametrize("kind", [ProbeConfig, FinetuneConfig])
def test_every_option_says_whether_results_depend_on_it(kind: type[Config]) -> None:
    unmarked = {f.name for f in fields(kind) if not option_of(f).result}
    assert unmarked <= NO_RESULT
    written = {option_of(f).result for f in fields(kind)} - {True, False}
    assert written <= {"recipes", "images", "splits", "metric", "positive", "head", "schedule"}


def test_values_are_normalized() -> None:
    assert ProbeConfig(lr=1).lr == (1.0,)
    assert DatasetRef(data_root="here").data_root == Path("here")
    assert DatasetRef(drop_class=["a", "b"]).drop_class == ("a", "b")


@pytest.mark.parametrize(
    ("kind", "options", "code"),
    [
        (ProbeConfig, {"folds": 1}, "option-bounds"),
        (ProbeConfig, {"folds": True}, "option-type"),
        (ProbeConfig, {"val": "half"}, "option-choice"),
        (ProbeConfig, {"fold": 5}, "unknown-option"),
        (ProbeConfig, {"lr": ["fast"]}, "option-type"),
        (ExtractConfig, {"part": (3, 2)}, "option-part"),
        (ExtractConfig, {"format": "netcdf"}, "option-choice"),
        (ExtractConfig, {"max_pixels": 0}, "option-bounds"),
    ],
)
def test_bad_values_are_refused(kind: type[Config], options: dict[str, Any], code: str) -> None:
    with refused(UsageError, code):
        kind.make(None, options)


@pytest.mark.parametrize(
    ("kind", "options", "fix"),
    [
        (ExtractConfig, {"rows_per_shard": 9_999_999}, "--rows-per-shard 1048576"),
        (ProbeConfig, {"lr": float("nan")}, "leave --lr out"),
        (ProbeConfig, {"lr": float("inf")}, "leave --lr out"),
        (FinetuneConfig, {"lr": 0.0}, "leave --lr out"),
        (MapConfig, {"perplexity": float("nan")}, "--perplexity 30.0"),
    ],
)
def test_advice_on_a_value_out_of_bounds_is_a_valid_one(kind: type[Config], options: dict[str, Any], fix: str) -> None:
    with refused(UsageError, "option-bounds") as caught:
        kind.make(None, options)
    assert caught.value.fix == fix
    assert "inf" not in str(caught.value.expected)


def test_options_are_typed_as_they_are_read() -> None:
    config = FinetuneConfig(lr=0.01, models=False, weights={"dino": Path("x y.pth")}, again=True, resume=None)
    assert config.words() == ["--weights", "dino=x y.pth", "--lr", "0.01", "--no-models", "--again"]
    assert FinetuneConfig().words() == []
    assert ProbeConfig(lr=[1e-3, 1e-4], head_options={"k": 5}).words()[:2] == ["--head-option", "k=5"]


def test_checkpoints_name_their_backbones() -> None:
    assert parse_weights(["dino=a=b.pth", "swav=c"]) == {"dino": Path("a=b.pth"), "swav": Path("c")}
    assert parse_weights(["a.pth"], ["dino"]) == {"dino": Path("a.pth")}
    for value in ("dino.pth", "=dino.pth", "dino="):
        with refused(UsageError, "weights-unnamed"):
            parse_weights([value])
    for value in ("a.pth", "rino=a.pth"):
        with refused(UsageError, "weights-unnamed"):
            parse_weights([value], ["dino", "swav"])


@dataclass(frozen=True)
class Toy(Config):
    heading = "Toy options"
    size: int = option(3, "Size.", least=1, result=True)
    names: tuple[str, ...] = option((), "Names.", metavar="NAME")
    quiet: bool = option(True, "Quiet.", flag="--quiet/--no-quiet")
    hidden: str = option("", "Not offered.")


def test_each_field_is_an_option_of_the_command() -> None:
    app = typer.Typer()
    seen = []

    @app.command()
    @command()
    def toys(
        *, word: str = "x", backbone: list[str], home: Path | None, toy: Annotated[Toy, Skip("hidden")], ref: DatasetRef
    ) -> Answer:
        seen.append((word, backbone, home, toy, ref))
        return Answer({"size": toy.size}, lambda: print("shown"), ("ls",), failed=True)

    arguments = ["--size", "4", "--names", "a", "--names", "b", "--no-quiet", "--data-root", "d", "--word", "y"]
    done = CliRunner().invoke(app, [*arguments, "--backbone", "a,b", "--backbone", "c", "--home", "h"])
    assert (done.exit_code, done.stdout, done.stderr) == (1, "shown\n", "next: embcache ls --home h\n")
    assert seen == [("y", ["a", "b", "c"], Path("h"), Toy(4, ("a", "b"), False), DatasetRef(data_root="d"))]
    done = CliRunner().invoke(app, ["--json", "-"])
    assert (json.loads(done.stdout), done.stderr) == ({"size": 3}, "")
    assert CliRunner().invoke(app, ["--hidden", "x"]).exit_code == 2

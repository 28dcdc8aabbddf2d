"""The built wheel works outside the checkout, and a plugin extends it without an edit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHECKOUT = Path(__file__).resolve().parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
Embcache = Callable[..., list[str]]
# Commands as they are typed, in one process: torch is imported once.
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from embcache.cli import app
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, (words, done.output)
    print(json.dumps(done.stdout))
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(source: Path, names: tuple[str, ...], folder: Path, site: Path) -> Path:
    """Build a wheel from a copy, so that nothing is left behind in the checkout, and install it."""
    copy = folder / source.name
    copy.mkdir(parents=True)
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / name, copy / name)
    wheels = folder / f"wheels-{source.name}"
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(copy), cwd=folder)
    (wheel,) = wheels.glob("*.whl")
    run(*PIP, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=folder)
    return wheel


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package and nothing else."""
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs setuptools 77 (extra dev)")
    folder = tmp_path_factory.mktemp("wheel")
    wheel = install(CHECKOUT, ("pyproject.toml", "README.md", "LICENSE", "embcache"), folder, folder / "site")
    names = {path.name for path in (folder / "site").iterdir()} - {"bin"}
    assert names == {"embcache", wheel.name.split("-py3")[0] + ".dist-info"}
    return folder / "site"


@pytest.fixture
def embcache(site: Path, tmp_path: Path) -> Embcache:
    """The installed command, in an empty folder and with a home of its own."""

    def commands(*each: tuple[str, ...]) -> list[str]:
        environment = {"PYTHONPATH": str(site), "EMBCACHE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        said = run(sys.executable, "-P", "-c", SCRIPT, json.dumps(each), cwd=tmp_path, **environment)
        return [json.loads(line) for line in said.splitlines()]

    return commands


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(site: Path, tmp_path: Path) -> None:
    assert (site / "embcache" / "py.typed").is_file()
    templates = site / "embcache" / "report" / "templates"
    assert {path.name for path in templates.iterdir()} == {
        "checklist.csv",
        "macros.html.j2",
        "page.css",
        "page.html.j2",
        "page.js",
    }
    code = "import embcache; print(embcache.__file__)"
    where = run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(where.strip()).is_relative_to(site)
    assert "dino" in run(sys.executable, "-P", "-m", "embcache", "backbones", cwd=tmp_path, PYTHONPATH=str(site))


def draw_lesions(root: Path) -> None:
    """Sixty images of thirty patients, ten of whom are the test set; malignant ones are darker."""
    (root / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), ["image,diagnosis,patient,split"]
    for k in range(60):
        malignant = k // 2 % 2
        pixels = rng.normal(150 - 40 * malignant, 20, (48, 48, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"i{k}.png")
        split = "test" if k >= 40 else "train"
        rows.append(f"i{k},{('benign', 'malignant')[malignant]},p{k // 2},{split}")
    (root / "labels.csv").write_text("\n".join(rows), "utf-8")


@pytest.mark.slow
def test_a_plugin_adds_a_backbone_a_head_a_dataset_and_a_metric(site: Path, embcache: Embcache, tmp_path: Path) -> None:
    install(CHECKOUT / "tests" / "plugin", ("pyproject.toml", "embcache_plugin"), tmp_path, site)
    draw_lesions(tmp_path / "lesions")
    images, predictions = tmp_path / "lesions" / "images", tmp_path / "predictions.csv"
    *listed, _, probed = embcache(
        ("backbones",), ("heads",), ("datasets",),
        ("extract", "--backbone", "tiny", "--dataset", "lesions", "--data-root", str(tmp_path / "lesions")),
        ("probe", "--head", "bottleneck", "--head-option", "rank=2", "--metric", "youden", "--subset", "12",
         "--folds", "2", "--dataset", "lesions", "--backbone", "tiny", "--json", "-"),
    )  # fmt: skip
    for name, text in zip(("tiny", "bottleneck", "lesions"), listed, strict=True):
        assert name in text
    (result,) = json.loads(probed)
    assert (result["dataset"], result["backbones"], result["head"]) == ("lesions", ["tiny"], "bottleneck")
    assert result["metric"] == "youden"
    assert -1 <= result["mean"] <= 1
    found, _ = embcache(
        ("results", "--json", "-"),
        ("predict", "--run", result["id"], str(images), "--output", str(predictions)),
    )  # fmt: skip
    assert result["id"] in found
    assert len(predictions.read_text("utf-8").splitlines()) == 61

"""The built wheel works outside the checkout, and puts nothing but ``embcache`` into site-packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path: Path, home: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs setuptools 77 (extra dev)")
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    # A copy, so that building leaves nothing behind in the checkout.
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((CHECKOUT / name).read_bytes())
    for path in (CHECKOUT / "embcache").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = source / path.relative_to(CHECKOUT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("embcache-*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=tmp_path)
    assert {p.name for p in site.iterdir()} - {"bin"} == {"embcache", wheel.name.split("-py3")[0] + ".dist-info"}
    assert (site / "embcache" / "py.typed").is_file()
    templates = site / "embcache" / "report" / "page" / "templates"
    assert {path.name for path in templates.iterdir()} == {"page.css", "page.html.j2", "page.js"}
    where = run(
        sys.executable, "-P", "-c", "import embcache; print(embcache.__file__)", cwd=tmp_path, PYTHONPATH=str(site)
    )
    assert Path(where.strip()).is_relative_to(site)
    table = run(sys.executable, "-P", "-m", "embcache", "backbones", cwd=tmp_path, PYTHONPATH=str(site))
    assert "dino" in table

"""``embcache report`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embcache.errors import UsageError
from tests.commands.shell import embcache
from tests.refusal import refused
from tests.report.build import NAME, Study, make_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("study"), n=120)


def test_it_writes_one_file_and_warns_of_patient_data(study: Study, tmp_path: Path) -> None:
    target, data = tmp_path / "study.html", tmp_path / "answer.json"
    words = ["--dataset", NAME, "--rows", "all", "--output", target, "--json", data]
    done = embcache("report", "--home", study.home, *words)
    assert target.stat().st_size > 1_000_000  # Bokeh is inside
    assert {path.name for path in tmp_path.iterdir()} == {"study.html", "answer.json"}
    assert f"report: {target}" in done.stdout
    assert "Take strong: it scored best on validation" in done.stdout
    assert "may be patient data" in done.stderr
    assert "--no-images" in done.stderr
    answer = json.loads(data.read_text("utf-8"))
    assert (answer["thumbnails"], answer["datasets"], answer["bytes"]) == (120, [NAME], target.stat().st_size)


def test_without_images_there_is_nothing_to_warn_of(study: Study, tmp_path: Path) -> None:
    words = ["--no-images", "--metric", "balanced_accuracy,accuracy", "--output", tmp_path / "r.html"]
    done = embcache("report", "--home", study.home, *words)
    assert "test balanced accuracy of" in done.stdout
    assert "patient data" not in done.stderr
    text = (tmp_path / "r.html").read_text("utf-8")
    for name in ("&lt;b&gt;0", "\\u003cb\\u003e0", "mrs-jones"):
        assert name not in text
    with refused(UsageError, "output-suffix"):
        embcache("report", "--output", "r.pdf", "--home", tmp_path)

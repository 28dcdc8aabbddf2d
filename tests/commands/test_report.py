"""``embcache report`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embcache.errors import UsageError
from tests.commands.shell import embcache
from tests.report.build import NAME, Study, make_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("study"), n=120)


def test_it_writes_one_file_and_warns_of_patient_data(study: Study, tmp_path: Path) -> None:
    target = tmp_path / "study.html"
    done = embcache("report", "--home", study.home, "--dataset", NAME, "--output", target)
    assert target.stat().st_size > 1_000_000  # Bokeh is inside
    assert [path.name for path in tmp_path.iterdir()] == ["study.html"]
    assert f"report: {target}" in done.stdout
    assert "Take strong: it scored best on validation" in done.stdout
    assert "may be patient data" in done.stderr
    assert "--no-images" in done.stderr


def test_without_images_there_is_nothing_to_warn_of(study: Study, tmp_path: Path) -> None:
    done = embcache("report", "--home", study.home, "--no-images", "--output", tmp_path / "r.html")
    assert "patient data" not in done.stderr
    text = (tmp_path / "r.html").read_text("utf-8")
    assert "&lt;b&gt;0" not in text
    assert "\\u003cb\\u003e0" not in text
    assert "mrs-jones" not in text


def test_all_labelled_images_on_request_as_json(study: Study, tmp_path: Path) -> None:
    done = embcache("report", "--home", study.home, "--rows", "all", "--output", tmp_path / "r.html", "--json", "-")
    answer = json.loads(done.stdout)
    assert answer["thumbnails"] == 120
    assert answer["datasets"] == [NAME]
    assert answer["bytes"] == (tmp_path / "r.html").stat().st_size


def test_another_metric(study: Study, tmp_path: Path) -> None:
    done = embcache(
        "report", "--home", study.home, "--metric", "kappa,accuracy", "--no-images", "--output", tmp_path / "r.html"
    )
    assert "test kappa of" in done.stdout


def test_a_name_that_is_no_page_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--output r\.html"):
        embcache("report", "--output", "r.pdf", "--home", tmp_path)

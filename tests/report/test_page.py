"""The whole page of a study with hostile names: what it holds, what it escapes, what it leaves out."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from embcache.errors import ProtocolError, StoreNotFoundError, UsageError
from embcache.probe.probe import probe_features
from embcache.report.collect import HIDDEN, Part, choose, collect_parts, make_tasks
from embcache.report.page import Written, _numeric, json_text, write_report
from embcache.report.sections import NEW_MODEL, THESE_MODELS, decide
from embcache.results.compare import load_tested
from embcache.runs.folders import save_run
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused
from tests.report.build import CLASSES, HOSTILE, NAME, Study, make_study
from tests.results.build import make_result


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """With a run that predicts a column."""
    study = make_study(tmp_path_factory.mktemp("study"), heads=("linear", "dvme-token"))
    probe_features(study.ds, ["strong"], folds=2, subset=20, home=study.home, target="sex")
    return study


@pytest.fixture(scope="module")
def written(study: Study) -> Written:
    return write_report(study.home / "full.html", home=study.home)


@pytest.fixture(scope="module")
def private(study: Study) -> Written:
    """Without images, by other metrics."""
    return write_report(study.home / "r.html", home=study.home, metrics=["accuracy", "log_loss"], images=False)


@pytest.fixture(scope="module")
def page(written: Written) -> str:
    return written.path.read_text("utf-8")


class _Tags(HTMLParser):
    """Tags and attributes of a page, its text, and the content of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._inside == "script" else self.words).append(data)


def _data(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]


def test_it_holds_a_whole_study(written: Written, page: str, study: Study) -> None:
    assert written.datasets == (NAME,)
    assert written.results == 7
    assert [line.split(":")[0] for line in written.headlines] == [NAME, f"{NAME}, sex"]
    assert written.thumbnails == 75
    assert not written.notes
    words = " ".join(_Tags(page).words)
    for part in ("learning curves", "Calibration", "Confusion", "Subgroups", "Embedding map", "Attention of", "Entropy",
                 "Patients and images", "Case mix", "What CLAIM and TRIPOD+AI require", "Provenance", "fingerprint",
                 "trained with labels", NEW_MODEL, THESE_MODELS, "ensemble: what predict uses", "detectable",
                 "intercept", "share observed"):  # fmt: skip
        assert part in words, part
    # Nothing of what is not there: a paper of these images, images that could not be read.
    assert "Beside the paper" not in words
    assert "could not be read" not in words
    assert words.index(": Take ") < words.index("training labels (+ validation)") < words.index("learning curves")
    assert f"embcache probe --dataset folder --data-root FOLDER --name {NAME} --head linear" in words
    assert "--backbone strong,weak" in words or "--backbone weak,strong" in words
    assert "--target sex" in words
    (part,) = collect_parts([NAME], home=study.home)
    best = choose(part.tasks[0], part, resamples=50)[-1].chosen
    c = part.tasks[0].class_names.index("$$\\frac{a}{b}$$")
    logits = best.tested.predictions.logits
    odds = logits[..., c] - np.log(np.exp(np.delete(logits, c, axis=2)).sum(-1))
    theirs = np.mean([roc_auc_score(best.tested.labels == c, z) for z in odds])
    assert f"(AUC {theirs:.3f})" in page  # in the legend of the ROC curves


def test_nothing_is_fetched_and_no_other_script_may_run(page: str) -> None:
    found = _Tags(page)
    for tag, attributes in found.tags:
        for name in ("src", "href"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:")) or not value, (tag, value)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert len(scripts) == 3
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert policy.count("sha256-") == 2
    assert "unsafe-eval" not in policy
    assert "script-src 'unsafe" not in policy


def test_hostile_names_stay_text(page: str, study: Study) -> None:
    assert HOSTILE not in page
    assert "<i>" not in _without_scripts(page)
    assert str(study.home.parent) not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>" not in _without_scripts(page)
    assert "\u2028" not in page
    data = _data(page)
    assert sorted(next(iter(data["maps"].values()))["classes"]) == sorted(CLASSES)
    assert set(next(iter(data["maps"].values()))["ids"]) <= set(study.ds.table["id"])
    for chart in data["charts"]:
        drawn = json.dumps(chart["item"])
        assert "alert" not in drawn  # no name of a user reaches Bokeh
        assert "frac" not in drawn


def test_groups_are_named_on_no_page(page: str) -> None:
    assert "mrs-jones" not in page


def test_numbers_are_aligned_to_the_right() -> None:
    rows = [("a", "0.912 ± 0.012", "best", "–", "1,024"), ("b", "−0.1 (−0.2 to 0.1)", "0.3", "< 0.001", "–")]
    assert _numeric(rows) == [False, True, False, True, True]
    assert _numeric([]) == []


def test_operating_points_are_chosen_without_test_labels(tmp_path: Path) -> None:
    ds = make_dataset(np.arange(120) % 2, None, ["train"] * 60 + ["test"] * 60)
    put_store(tmp_path, ds, "strong", make_features(ds, shift=1.0))
    result = probe_features(ds, ["strong"], folds=2, subset=20, home=tmp_path, head="linear")
    folder = tmp_path / ds.name / "runs" / result.id
    t = load_tested(result, folder)
    shuffled = replace(t.predictions, labels=np.random.default_rng(0).permutation(t.labels))
    tables = [decide(tested, folder, "c")["points"] for tested in (t, replace(t, predictions=shuffled))]
    thresholds, sensitivities = ([[row[k] for row in table.rows] for table in tables if table] for k in (2, 3))
    assert thresholds[0] == thresholds[1]
    assert sensitivities[0] != sensitivities[1]


def test_the_first_metric_chooses_and_the_others_stand_beside_it(study: Study, private: Written) -> None:
    text = _without_scripts(private.path.read_text("utf-8"))
    assert "test accuracy of" in private.headlines[0]
    assert "test accuracy (always " in text
    assert "log loss</th>" in text
    assert "--metric accuracy,log_loss" in text
    (part,) = collect_parts([NAME], home=study.home, metrics=["log_loss"])
    best, *others = choose(part.tasks[0], part, resamples=50)[-1].rivals
    assert all(best.validated <= rival.validated for rival in others)  # a loss: the lowest is best
    with pytest.raises(UsageError, match="no such metric"):
        collect_parts([NAME], home=study.home, metrics=["area"])
    with pytest.raises(ProtocolError, match="two classes"):
        collect_parts([NAME], home=study.home, metrics=["sensitivity"])


def _without_scripts(page: str) -> str:
    return re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S)


def test_without_images_nothing_names_one(study: Study, private: Written) -> None:
    text = private.path.read_text("utf-8")
    assert private.thumbnails == 0
    assert "neither thumbnails nor IDs of images are in this file" in text
    assert "image/webp" not in text.replace("data:image/webp;base64,${", "")
    table = study.ds.table
    for value in {*table["id"], *table["path"], *table["group"], *(Path(p).stem for p in table["path"])}:
        assert value not in text
        assert json.dumps(value)[1:-1] not in text
    assert str(study.home) not in text
    assert str(study.table.parent) not in text
    (of_map,) = _data(text)["maps"].values()
    assert of_map["ids"] is None
    assert of_map["thumbs"] is None
    assert of_map["labels"] != np.sort(of_map["labels"]).tolist()


def test_without_images_and_with_runs_alone_a_page_lists_what_is_missing(study: Study, tmp_path: Path) -> None:
    home, pictures = tmp_path / "home", study.table.parent
    shutil.copytree(study.home / NAME, home / NAME)
    pictures.rename(pictures.with_name("away"))
    try:
        done = write_report(tmp_path / "r.html", home=home)
        assert done.thumbnails == 0
        text = done.path.read_text("utf-8")
        assert "the map has no thumbnails" in text
        assert "the copy kept at extraction" in text
        for path in (home / NAME).iterdir():
            if path.name != "runs":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        done = write_report(tmp_path / "r.html", home=home)
        assert any("no map" in note for note in done.notes)
        assert any("is not available" in note for note in done.notes)
        pages = [write_report(tmp_path / "r.html", home=home, images=False).path.read_text("utf-8") for _ in range(2)]
    finally:
        pictures.with_name("away").rename(pictures)
    text, again = (re.sub(r'"(id|root_id)":"p\d+"', "", page) for page in pages)
    assert text == again  # but for Bokeh's own names
    assert "Take " in text
    assert HIDDEN in text
    assert "scan&lt;b" not in text


def test_the_best_is_never_chosen_by_test_score(tmp_path: Path) -> None:
    """The family with the best test score loses where its validation score is lower."""
    results = [
        make_result((0.9, 0.91, 0.92), id="good-test", val_mean=0.7, backbones=("a",)),
        make_result((0.7, 0.71, 0.72), id="good-val", val_mean=0.9, backbones=("b",)),
    ]
    (task,) = make_tasks(results)
    table = pd.DataFrame(
        {"id": [f"i{k}" for k in range(20)], "label": [0, 1] * 10, "group": [f"g{k}" for k in range(20)]}
    )
    rng = np.random.default_rng(0)
    for result in results:
        frames = []
        for fold in range(3):
            p = rng.uniform(size=20)
            frames.append(table.assign(fold=fold, p_0=1 - p, p_1=p, logit_0=np.log(1 - p), logit_1=np.log(p)))
        save_run(result, pd.concat(frames), [], tmp_path)
    part = Part("pneumonia", None, "", "", tuple(results), (task,), 0, tmp_path)
    (choice,) = choose(task, part, resamples=50)
    assert choice.chosen.name == "b, linear"
    assert [rival.name for rival in choice.rivals] == ["b, linear", "a, linear"]
    other = replace(results[0], request={**results[0].request, "splits": "others"})
    (apart,) = make_tasks([other, results[1]])
    (alone,) = choose(apart, part, resamples=50)
    assert len(alone.rivals) == 1
    assert len(alone.apart) == 1


def test_no_results_and_wrong_options_are_refused(study: Study, tmp_path: Path) -> None:
    with refused(StoreNotFoundError, "no-results"):
        write_report(tmp_path / "r.html", home=tmp_path / "nowhere")
    with refused(StoreNotFoundError, "no-results"):
        write_report(tmp_path / "r.html", ["other"], home=study.home)
    with refused(UsageError, "option-choice"):
        write_report(tmp_path / "r.html", home=study.home, rows="some")


def test_json_may_stand_in_a_script() -> None:
    text = json_text({"a": "</script><!-- & \u2028 é"})
    assert not set("<>&\u2028é") & set(text)
    assert json.loads(text) == {"a": "</script><!-- & \u2028 é"}

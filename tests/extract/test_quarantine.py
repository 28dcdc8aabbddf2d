"""What a run bears: unreadable images up to a limit, and nothing that only looks like one."""

from __future__ import annotations

import errno
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import embcache
import embcache.extract.extract as extracting
import embcache.extract.recipes as run
import embcache.extract.worker as batching
from embcache.backbones.catalog import LoadedBackbone
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import DatasetError, DatasetNotFoundError, UsageError
from embcache.extract.extract import Extraction
from embcache.extract.quarantine import parse_max_bad
from embcache.store.feature_store import open_store
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny, run_extraction
from tests.refusal import refused


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_backbone", load_tiny)
    monkeypatch.setitem(extracting.ROWS_PER_SHARD, "cpu", 6)


def load(root: Path) -> ImageDataset:
    return load_dataset("folder", root)


def extract(root: Path, **keywords: object) -> Extraction:
    (done,) = run_extraction(["random"], load(root), **keywords)  # type: ignore[arg-type]
    return done


def spoil(root: Path, *numbers: int) -> None:
    for number in numbers:
        (root / ("benign" if number % 2 else "malignant") / f"{number:02}.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("value", "images", "allowed"), [("1%", 20, 1), ("0%", 20, 0), ("2.5%", 1000, 25), ("7", 20, 7)]
)
def test_the_limit_is_a_share_or_a_number(value: int | str, images: int, allowed: int) -> None:
    assert parse_max_bad(value, images) == allowed


@pytest.mark.parametrize("value", ["", "-1", "101%", "0.5", "٣%"])
def test_other_limits_are_refused(value: str) -> None:
    with refused(UsageError, "option-max-bad"):
        parse_max_bad(value, 20)


def test_above_the_limit_the_run_stops_before_the_commit_and_can_go_on(images: Path, home: Path) -> None:
    spoil(images, 1, 11, 13)  # by class: the 1st, 6th and 7th of benign, which come first
    with pytest.raises(DatasetError, match="too many images cannot be used: 2 of 20") as caught:
        extract(images, max_bad="5%")
    assert "at most 1 (--max-bad 5%)" in str(caught.value)
    assert str(caught.value).count(": the file is empty") == 2
    assert "--max-bad 2" in str(caught.value)
    store = open_store("random", load(images).name)
    assert store.committed() == ()
    with pytest.raises(DatasetError, match=r"3 of 20 \(1 of them in the current shard"):
        extract(images, max_bad=2)
    assert store.committed() == (0,)
    done = extract(images, max_bad=3)
    assert (done.computed, done.cached, len(done.quarantined)) == (14, 6, 3)
    # Nothing is computed any more, so nothing is judged.
    assert extract(images, max_bad=0).computed == 0


def test_one_bad_image_is_borne_by_default_and_two_of_twenty_are_not(images: Path, home: Path) -> None:
    spoil(images, 1)
    assert len(extract(images).quarantined) == 1
    spoil(images, 3)
    with refused(DatasetError, "too-many-bad-images"):
        extract(images)


def test_images_that_left_the_dataset_do_not_count(images: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(extracting.LocalEngine, "run", lambda *_: ())
        extract(images)  # plans only
    kept = images.parent / "kept"
    for number in (1, 3, 5):
        path = images / "benign" / f"{number:02}.png"
        shutil.copytree(path.parent, kept, dirs_exist_ok=True)
        path.unlink()
    done = extract(images, max_bad=0)
    assert (done.computed, len(done.store), done.quarantined) == (20, 17, {})
    # Back again with the same size and time, they are computed.
    for number in (1, 3, 5):
        shutil.copy2(kept / f"{number:02}.png", images / "benign" / f"{number:02}.png")
    shutil.rmtree(kept)
    assert (extract(images).computed, len(extract(images).store)) == (3, 20)


def test_fail_stops_at_the_first_and_commits_nothing_of_its_shard(images: Path, home: Path) -> None:
    spoil(images, 3, 15)
    with pytest.raises(DatasetError) as caught:
        extract(images, on_error="fail", batch_size=1)
    assert "benign/03.png" in str(caught.value)
    assert "the file is empty" in str(caught.value)
    assert str(images / "benign" / "03.png") in str(caught.value)
    assert open_store("random", load(images).name).committed() == ()
    with refused(UsageError, "option-choice"):
        extract(images, on_error="ignore")


class Odd(nn.Module):
    """Infinite features of every second image of a batch."""

    def __init__(self, module: nn.Module, value: float) -> None:
        super().__init__()
        self.module, self.value = module, value

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.module(pixels).clone()
        if len(pixels) > 2:  # not of the canaries
            features[::2, 0] = self.value
        return features


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (7e4, "float16")])
def test_features_that_are_not_finite_count_as_bad(
    images: Path, home: Path, monkeypatch: pytest.MonkeyPatch, value: float, dtype: str
) -> None:
    def load_odd(name: str, **_: object) -> LoadedBackbone:
        loaded = load_tiny(name)
        return LoadedBackbone(loaded.spec, Odd(loaded.module, value), loaded.weights_sha256, loaded.weights_source)

    monkeypatch.setattr(run, "load_backbone", load_odd)
    with refused(DatasetError, "too-many-bad-images"):
        extract(images, feature_dtype=dtype)
    with refused(DatasetError, "bad-image"):
        extract(images, feature_dtype=dtype, on_error="fail")
    done = extract(images, feature_dtype=dtype, max_bad="50%")
    assert set(done.quarantined.values()) == {"the features are not finite"}
    assert (len(done.store), len(done.quarantined)) == (10, 10)
    assert np.isfinite(done.store.features[:]).all()


@pytest.mark.parametrize("code", [errno.EIO])
def test_a_failing_medium_is_told_with_image_and_error(
    images: Path, home: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    original = batching.read_image

    def fail(root: Path, path: str, place: str, *more: object) -> object:
        if path.endswith("09.png"):
            raise OSError(code, "no such luck")
        return original(root, path, place, *more)

    with monkeypatch.context() as patch:
        patch.setattr(batching, "read_image", fail)
        with refused(DatasetError, "image-not-readable") as caught:
            extract(images)
    assert errno.errorcode[code] in str(caught.value)
    assert str(images / "benign" / "09.png") in str(caught.value)
    assert (extract(images).computed, extract(images).quarantined) == (20, {})


@pytest.mark.parametrize("how", ["empty", "another", "flickers"])
def test_an_unmounted_root_quarantines_nothing(
    images: Path, home: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    original, aside = batching.read_image, images.with_name("aside")

    def read(root: Path, path: str, place: str, *more: object) -> object:
        if images.is_dir() and not aside.exists():
            if how == "empty":  # the same folder, as far as its numbers go
                shutil.copytree(images, aside)
                for child in list(images.iterdir()):
                    shutil.rmtree(child)
            else:
                images.rename(aside)
                if how == "another":
                    draw(images / "benign" / "else.png", 1)
        try:
            return original(root, path, place, *more)
        finally:
            if how == "flickers" and aside.exists():
                aside.rename(images)

    with monkeypatch.context() as patch:
        patch.setattr(batching, "read_image", read)
        with refused(DatasetNotFoundError, "images-went-away"):
            extract(images, max_bad="100%", workers=1)
    if how != "flickers":
        shutil.rmtree(images, ignore_errors=True)
        aside.rename(images)
    done = extract(images)
    assert (done.computed, done.quarantined) == (20, {})


def test_quarantined_images_are_retried_when_asked(images: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(batching, "read_image", _refuse_tens)
        assert len(extract(images, max_bad=2).quarantined) == 2
    assert extract(images, max_bad=2).computed == 0
    done = extract(images, retry_quarantined=True)
    assert (done.computed, done.retried, done.cached, done.quarantined) == (2, 2, 18, {})
    assert extract(images, retry_quarantined=True).computed == 0


def _refuse_tens(root: Path, path: str, place: str, *more: object) -> object:
    from embcache.data.images import read_image
    from embcache.errors import ImageError

    if path.endswith("0.png"):
        error = ImageError("a decoder that is too old")
        error.digest = hashlib.sha256((root / path).read_bytes()).hexdigest()
        raise error
    return read_image(root, path, place, *more)


def test_no_grey_or_zero_row_reaches_a_probe_and_the_result_says_how_many_are_missing(images: Path, home: Path) -> None:
    for index in range(20, 80):
        draw(images / ("benign" if index % 2 else "malignant") / f"{index:02}.png", index)
    spoil(images, 1, 2, 40)
    whole = images / "malignant" / "44.png"
    whole.write_bytes(whole.read_bytes()[:-400])
    dataset = load(images)
    (done,) = run_extraction(["random"], dataset, max_bad=4)
    assert len(done.quarantined) == 4
    features, _, _ = done.store.arrays(dataset)
    assert features.shape == (76, 6)
    assert np.abs(features).sum(axis=1).min() > 0
    result = embcache.probe_features(dataset, ["random"], head="knn", subset="F")
    assert "4 unreadable images left out" in result.notes
    fold = result.folds[0]
    assert fold.n_train + fold.n_val + result.n_test == 76


def test_another_limit_on_pixels_looks_again_at_what_it_allows_and_keeps_the_recipe(images: Path, home: Path) -> None:
    draw(images / "benign" / "large.png", 99, size=48)
    first = extract(images, max_pixels=2_303)
    (reason,) = first.quarantined.values()
    assert reason.startswith("too large: 2,304 pixels, more than 2,303")
    again = extract(images, max_pixels=2_303)
    assert (again.computed, again.store.path) == (0, first.store.path)
    done = extract(images, max_pixels=2_304)
    assert (done.computed, done.retried, done.quarantined) == (1, 1, {})
    assert done.store.path == first.store.path
    assert extract(images, max_pixels=2_303).computed == 0  # what is there is right
    for scan in home.rglob("scan.parquet"):
        scan.unlink()
    assert extract(images, max_pixels=2_303).computed == 0
    with refused(UsageError, "option-bounds"):
        extract(images, max_pixels=0)


def test_an_image_that_the_transform_blows_up_is_quarantined(images: Path, home: Path) -> None:
    Image.new("RGB", (60_000, 3)).save(images / "benign" / "wide.png")
    (reason,) = extract(images, transform="imagenet").quarantined.values()
    assert "too thin for the transform" in reason


def test_an_extraction_says_of_which_images_it_used_the_first_frame(images: Path, home: Path) -> None:
    frames = [Image.new("L", (24, 24), shade) for shade in (0, 255)]
    frames[0].save(images / "benign" / "stack.tif", save_all=True, append_images=frames[1:])
    said: list[str] = []
    extract(images, say=said.append)
    assert [line for line in said if "frames" in line] == [
        "1 images: the first of several frames or pages is used (benign/stack.tif)"
    ]

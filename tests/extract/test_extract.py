"""What a user relies on in extraction: the right features, once, and nothing else computed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import embcache.extract.extract as extracting
import embcache.extract.recipes as run
import embcache.extract.worker as batching
from embcache.backbones.catalog import Backbone, LoadedBackbone
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import DatasetNotFoundError, UsageError
from embcache.extract.extract import extract_features
from embcache.store.feature_store import FeatureStore
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny, run_extraction
from tests.refusal import refused


@pytest.fixture(autouse=True)
def tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network, but for tests of torchvision's features and of own networks."""
    if not {"direct_features", "from_module"} & set(request.function.__code__.co_names):
        monkeypatch.setattr(run, "load_backbone", load_tiny)


def load(root: Path) -> ImageDataset:
    return load_dataset("folder", root)


def extract(root: Path, **keywords: object) -> FeatureStore:
    store = extract_features("random", load(root), **keywords)  # type: ignore[arg-type]
    assert isinstance(store, FeatureStore)
    return store


def direct_features(root: Path, paths: list[str]) -> np.ndarray:
    """One image at a time through torchvision's own network, without embcache."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torchvision.models.resnet50(weights=None)
    network.fc = torch.nn.Identity()
    network.eval()
    rows = []
    for path in paths:
        pixels = torchvision.transforms.functional.to_tensor(Image.open(root / path).convert("RGB"))
        pixels = torchvision.transforms.functional.normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        with torch.inference_mode():
            rows.append(network(pixels[None])[0].numpy())
    return np.stack(rows)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool(np.abs(found - expected).max() <= tolerance * np.abs(expected).max())


def test_cached_features_equal_the_direct_path(images: Path, home: Path) -> None:
    dataset = load(images)
    dataset = replace(dataset, table=dataset.table.head(5))
    store = extract_features("random", dataset)
    assert isinstance(store, FeatureStore)
    assert store.ids.tolist() == dataset.table["id"].tolist()
    assert close(store.features[:], direct_features(images, dataset.table["path"].tolist()), 1e-4)


@pytest.mark.usefixtures("tiny")
def test_features_do_not_depend_on_batch_size_or_workers(images: Path, home: Path, tmp_path: Path) -> None:
    reference = extract(images, home=tmp_path / "a", batch_size=20, workers=1).features[:]
    for batch_size, workers in ((7, 3), (64, 2)):
        other = extract(images, home=tmp_path / f"{batch_size}", batch_size=batch_size, workers=workers).features[:]
        assert close(other, reference)


@pytest.mark.usefixtures("tiny")
def test_a_second_run_computes_nothing(images: Path, home: Path) -> None:
    first = run_extraction(["random"], load(images))[0]
    second = run_extraction(["random"], load(images))[0]
    assert (first.computed, first.cached) == (20, 0)
    assert (second.computed, second.cached) == (0, 20)
    assert second.store.path == first.store.path


@pytest.mark.usefixtures("tiny")
def test_only_added_and_changed_images_are_extracted(images: Path, home: Path) -> None:
    before = extract(images)
    old = dict(zip(before.ids.tolist(), before.features[:], strict=True))
    draw(images / "benign" / "new.png", 100)
    draw(images / "benign" / "01.png", 101)
    done = run_extraction(["random"], load(images))[0]
    assert (done.computed, done.added, done.changed, done.cached) == (2, 1, 1, 19)
    now = dict(zip(done.store.ids.tolist(), done.store.features[:], strict=True))
    assert close(done.store.features[:], extract(images, home=home / "fresh").features[:])
    (changed,) = [image for image in old if not np.array_equal(old[image], now[image])]
    assert "01" in changed


@pytest.mark.usefixtures("tiny")
def test_several_backbones_decode_each_image_once(images: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = batching.read_image

    def count(root: Path, path: str, place: str, *more: object) -> object:
        read.append(path)
        return original(root, path, place, *more)

    monkeypatch.setattr(batching, "read_image", count)
    stores = extract_features(["random", "random:1"], load(images))
    assert isinstance(stores, dict)
    assert len(read) == 20
    one, other = stores["random"].features[:], stores["random:1"].features[:]
    alone = extract_features("random:1", load(images), home=home / "alone")
    assert isinstance(alone, FeatureStore)
    assert np.array_equal(other, alone.features[:])
    assert not np.allclose(one, other)


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_run_resumes_to_the_same_bytes(
    images: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(extracting.ROWS_PER_SHARD, "cpu", 6)
    whole = extract(images, home=tmp_path / "whole", batch_size=4)
    original, calls = batching.compute_shard, []

    def interrupted(*arguments: object, **keywords: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(batching, "compute_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(images, home=tmp_path / "resumed", batch_size=4)
    monkeypatch.setattr(batching, "compute_shard", original)
    done = run_extraction(["random"], load(images), home=tmp_path / "resumed")[0]
    assert done.computed == 8
    assert done.cached == 12
    for path in sorted((whole.path / "shards").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (done.store.path / path.relative_to(whole.path)).read_bytes()


@pytest.mark.usefixtures("tiny")
def test_another_recipe_never_touches_a_store(images: Path, home: Path) -> None:
    first = extract(images)
    before = {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file()}
    imagenet = extract(images, transform="imagenet")
    half = extract(images, precision="bf16")
    assert len({first.path, imagenet.path, half.path}) == 3
    assert {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file()} == before
    assert not np.array_equal(half.features[:], first.features[:])
    assert close(half.features[:], first.features[:], 0.1)


@pytest.mark.usefixtures("tiny")
def test_parts_together_are_the_whole(
    images: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(extracting.ROWS_PER_SHARD, "cpu", 6)
    whole = extract(images, home=tmp_path / "whole")
    counts = [run_extraction(["random"], load(images), part=(i, 3))[0].computed for i in (1, 2, 3)]
    assert sum(counts) == 20
    assert max(counts) < 20
    assert np.array_equal(extract(images).features[:], whole.features[:])


@pytest.mark.usefixtures("tiny")
def test_images_of_unequal_size_are_resized(images: Path, home: Path) -> None:
    extract(images)
    draw(images / "benign" / "large.png", 7, size=300)
    said: list[str] = []
    (done,) = run_extraction(["random"], load(images), say=said.append)
    store = done.store
    assert (done.computed, done.cached) == (21, 0)
    assert [line for line in said if "another recipe" in line and "transform.resize" in line]
    assert store.recipe.transform["resize"] == [256, 256]
    assert store.recipe.transform["size"] == [224, 224]
    assert len(store.ids) == 21
    run_extraction(["random"], load(images), transform="imagenet", say=said.append)
    assert len([line for line in said if "2 other recipes" in line]) == 1
    assert len([line for line in said if "cached under" in line]) == 2


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("keywords", "code"),
    [
        ({"device": "warp"}, "device"),
        ({"precision": "fp8"}, "option-choice"),
        ({"precision": "tf32", "device": "cpu"}, "precision-device"),
        ({"workers": 0}, "option-bounds"),
        ({"part": (3, 2)}, "option-part"),
        ({"weights": {"dino": "x"}}, "weights-unnamed"),
        ({"batchsize": 4}, "unknown-option"),
    ],
)
def test_bad_requests_get_one_clear_message(images: Path, home: Path, keywords: dict[str, object], code: str) -> None:
    with refused(UsageError, code):
        extract(images, **keywords)


@pytest.mark.usefixtures("tiny")
def test_a_dataset_without_images_is_refused(images: Path, home: Path) -> None:
    dataset = load(images)
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    with refused(DatasetNotFoundError, "no-readable-image"):
        extract_features("random", dataset)


def no_backbone() -> Backbone:
    raise KeyError("weights")


NUMBER = 5


def test_backbones_of_others_that_do_not_work_are_refused_and_leave_nothing(images: Path, home: Path) -> None:
    dataset = load_dataset("folder", images)
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # (B, 3)
    for own in (Backbone.from_module(net, name="wide", dim=17), Backbone.from_module(net[0], name="maps", dim=3)):
        with refused(UsageError, "backbone-output"):
            extract_features(own, dataset)
    for name, code in (("no_backbone", "backbone-function"), ("NUMBER", "backbone-type")):
        with refused(UsageError, code):
            extract_features(f"{__name__}:{name}", dataset)
    assert not list(home.rglob("recipe.json"))


def test_a_cached_dataset_may_be_named(images: Path, home: Path) -> None:
    dataset = load_dataset("folder", images, name="mine")
    store = extract_features("random", dataset)
    again = extract_features("random", "mine")
    assert isinstance(store, FeatureStore)
    assert isinstance(again, FeatureStore)
    assert again.path == store.path


# Complete stores: no network is built


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backbones whose networks were built; the digest of each is that of its ``--weights``."""
    names: list[str] = []

    def load_counted(name: str, **options: object) -> LoadedBackbone:
        names.append(name)
        given = options.get("weights")
        digest = hashlib.sha256(Path(str(given)).read_bytes() if given else name.encode()).hexdigest()
        return replace(load_tiny(name), weights_sha256=digest, inferred="trunk of a file" if given else "")

    monkeypatch.setattr(run, "load_backbone", load_counted)
    monkeypatch.setattr(extracting, "TICK_NS", -(10**10))  # files that were written just now count as settled
    return names


def memo(home: Path) -> Path:
    (file,) = home.glob("*/networks.json")
    return file


def facts(done: object) -> dict[str, object]:
    return {name: value for name, value in vars(done).items() if name != "seconds"}


def test_a_run_over_complete_stores_builds_no_network_and_says_the_same(
    images: Path, home: Path, tmp_path: Path, built: list[str]
) -> None:
    (images / "benign" / "cut.png").write_bytes(b"")
    (tmp_path / "w.pth").write_bytes(b"one")
    names, options = ["random", "supervised", "mine=supervised"], {"weights": (f"supervised={tmp_path / 'w.pth'}",)}
    options["weights"] += (f"mine={tmp_path / 'w.pth'}",)
    said: list[list[str]] = [[], [], []]
    first = [run_extraction(names, load(images), say=said[0].append, rows_per_shard=n, **options) for n in (7, 8)][1]
    assert len(built) == 6
    second = run_extraction(names, load(images), say=said[1].append, rows_per_shard=8, **options)
    assert len(built) == 6
    memo(home).unlink()
    third = run_extraction(names, load(images), say=said[2].append, rows_per_shard=8, **options)
    assert len(built) == 9
    assert [facts(each) for each in second] == [facts(each) for each in third]
    assert said[1] == said[2]
    assert any("trunk of a file" in text for text in said[1])
    assert any("keeps them" in text for text in said[1])
    assert second[0].quarantined == first[0].quarantined
    assert len(second[0].quarantined) == 1


def test_a_complete_store_needs_no_torch(images: Path, home: Path, built: list[str]) -> None:
    run_extraction(["random"], load(images))
    code = (
        "import sys; sys.argv[0] = 'embcache'\n"
        "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from embcache.cli import main; main()"
    )
    words = ["extract", "--backbone", "random", "--dataset", "folder", "--data-root", str(images), "--json", "-"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "False"
    assert '"cached": 20' in done.stdout


def test_another_weights_file_of_equal_size_and_time_is_noticed(
    images: Path, home: Path, tmp_path: Path, built: list[str]
) -> None:
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"one")
    first = run_extraction(["supervised"], load(images), weights=(str(weights),))[0]
    state = weights.stat()
    (tmp_path / "other").write_bytes(b"two")
    (tmp_path / "other").replace(weights)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    second = run_extraction(["supervised"], load(images), weights=(str(weights),))[0]
    assert len(built) == 2
    assert second.computed == 20
    assert second.store.path != first.store.path
    weights.unlink()
    with pytest.raises(FileNotFoundError):  # of the loader above
        run_extraction(["supervised"], load(images), weights=(str(weights),))


def test_a_checkpoint_that_was_just_written_is_not_trusted(
    images: Path, home: Path, tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extracting, "TICK_NS", 10**12)
    (tmp_path / "w.pth").write_bytes(b"one")
    for _ in range(2):
        run_extraction(["supervised"], load(images), weights=(str(tmp_path / "w.pth"),))
    assert len(built) == 2


def test_what_left_or_changed_since_is_computed(images: Path, home: Path, built: list[str]) -> None:
    first = run_extraction(["random"], load(images))[0]
    draw(images / "benign" / "01.png", 101)
    done = run_extraction(["random"], load(images))[0]
    assert (len(built), done.computed, done.changed, done.cached) == (2, 1, 1, 19)
    first.store.path.rename(home / "away")
    done = run_extraction(["random"], load(images))[0]
    assert (len(built), done.computed) == (3, 20)
    run_extraction(["random"], load(images))
    assert len(built) == 3
    for other in ({"transform": "imagenet"}, {"views": 2}, {"precision": "bf16"}, {"runtime": "eager"}):
        run_extraction(["random"], load(images), **other)
    assert len(built) == 7
    run_extraction(["random"], load(images), runtime="eager")
    assert len(built) == 8


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "others", "folder"])
def test_a_damaged_memo_does_no_harm(damage: str, images: Path, home: Path, built: list[str]) -> None:
    run_extraction(["random"], load(images))
    file = memo(home)
    whole = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        flipped = whole.replace(b'"random"', b'"swapped"')
        others = extracting.seal({"networks": {"a": {"recipe": 3}}, "more": [None]})
        file.write_bytes({"empty": b"", "cut": whole[:-9], "flipped": flipped, "others": others}[damage])
    assert run_extraction(["random"], load(images))[0].cached == 20
    assert len(built) == 2
    if damage != "folder":
        assert file.read_bytes() == whole


def test_processes_that_write_it_at_once_leave_it_whole(images: Path, home: Path, built: list[str]) -> None:
    dataset = load(images)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: run_extraction([f"random:{seed}"], dataset), (1, 2, 3, 4)))
    assert memo(home).read_bytes().endswith(b"}\n")
    assert not list(memo(home).parent.glob(".networks*"))
    run_extraction([f"random:{seed}" for seed in (1, 2, 3, 4)], dataset)
    before = len(built)
    run_extraction([f"random:{seed}" for seed in (4, 3, 2, 1)], dataset)
    assert len(built) == before


def test_code_of_others_is_never_remembered(images: Path, home: Path) -> None:
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    own = Backbone.from_module(module, name="own", dim=3)
    for _ in range(2):
        run_extraction([own], load(images))  # type: ignore[list-item]
    assert not list(home.glob("*/networks.json"))

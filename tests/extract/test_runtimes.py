"""What executes a network: the features are torch's, a store keeps its runtime, another one is recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from embcache.backbones import runtimes
from embcache.backbones.runtimes import Compiled, choose_runtime, departure
from embcache.backbones.transforms import choose_transform
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import UsageError
from embcache.extract import recipes as extraction
from embcache.extract.worker import freeze
from embcache.maintain.repair import check_sample, repair_store
from embcache.maintain.verify import verify_store
from embcache.store.feature_store import FeatureStore
from embcache.store.reading import read_commit
from tests.extract.tiny import load_tiny, run_extraction
from tests.refusal import refused

OTHERS = ["openvino", "onnxruntime"]


@pytest.fixture
def dataset(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageDataset:
    monkeypatch.setenv("EMBCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(extraction, "load_backbone", load_tiny)
    return load_dataset("folder", images, name="ds")


@pytest.mark.parametrize("runtime", OTHERS)
def test_features_of_a_runtime_are_those_of_torch(dataset: ImageDataset, tmp_path: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    (eager,) = run_extraction(["random"], dataset, home=tmp_path / "eager", runtime="eager")
    (other,) = run_extraction(["random"], dataset, home=tmp_path / "other", runtime=runtime)
    assert other.store.recipe == eager.store.recipe
    assert (eager.store.runtime, other.store.runtime) == ("eager", runtime)
    assert other.store.path.name == eager.store.path.name
    ours, theirs = other.store.features[:], eager.store.features[:]
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert run_extraction(["random"], dataset, home=tmp_path / "other")[0].computed == 0


def test_a_store_keeps_its_runtime_and_another_one_is_recorded(dataset: ImageDataset, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    home, said = tmp_path / "home", list[str]()
    run_extraction(["random"], dataset, home=home, runtime="openvino", rows_per_shard=8, part=(1, 3))
    run_extraction(["random"], dataset, home=home, part=(2, 3))
    (done,) = run_extraction(["random"], dataset, home=home, runtime="eager", say=said.append)
    made = [read_commit(done.store.path, number).runtime for number in done.store.committed()]
    assert (done.store.runtime, made) == ("openvino", [None, None, "eager"])
    assert any("created with the runtime openvino" in line for line in said)
    # A shard is made again by what made it: to the bit.
    before = done.store.features[:]
    for number in (0, 2):
        for file in (done.store.path / "shards" / f"{number:06}").rglob("*"):
            if file.is_file() and "features" in file.parts and file.name != "zarr.json":
                file.write_bytes(b"damaged")
    check = verify_store(done.store.path)
    assert {each.shard for each in check.damage} == {0, 2}
    repair_store(check, lambda: dataset)
    assert (FeatureStore(done.store.path).restrict(dataset.ids).features[:] == before).all()
    made = [read_commit(done.store.path, number).runtime for number in done.store.committed()]
    assert made == [None, None, "eager"]
    assert check_sample(done.store.path, dataset, 5).ok


def test_a_runtime_that_is_not_there_or_does_not_fit_is_one_message(
    dataset: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    run_extraction(["random"], dataset, home=tmp_path, runtime="openvino", rows_per_shard=8, part=(1, 3))
    with refused(UsageError, "runtime-unfit"):
        run_extraction(["random"], dataset, home=tmp_path, runtime="onnxruntime", precision="bf16")
    monkeypatch.setattr(runtimes, "is_installed", lambda name: name == "eager")
    with refused(UsageError, "runtime-missing") as caught:
        run_extraction(["random"], dataset, home=tmp_path)
    assert "embcache[cpu]" in str(caught.value)
    (done,) = run_extraction(["random"], dataset, home=tmp_path, runtime="eager")
    assert not done.left


def test_auto_takes_a_compiler_where_there_are_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "is_installed", lambda name: True)
    chosen = [choose_runtime("auto", *where) for where in (
        ("cpu", "fp32", 5000), ("cpu", "fp32", 100), ("cpu", "bf16", 5000), ("cuda", "fp32", 5000),
    )]  # fmt: skip
    assert chosen == ["openvino", "eager", "eager", "eager"]


def test_a_runtime_whose_features_depart_is_not_used(
    dataset: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    said: list[str] = []
    monkeypatch.setattr(Compiled, "__call__", lambda self, images: self.network(images) * 1.001)
    monkeypatch.setattr(runtimes, "_PAYS", 1)
    (done,) = run_extraction(["random"], dataset, home=tmp_path, say=said.append)
    assert done.store.runtime == "eager"
    assert any("openvino is not used" in line for line in said)
    with refused(UsageError, "runtime-departs"):
        run_extraction(["random:1"], dataset, home=tmp_path, runtime="openvino")


def test_a_network_that_a_runtime_does_not_know_stays_with_torch(
    dataset: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*_: object) -> None:
        raise RuntimeError("no such operation")

    pytest.importorskip("openvino")
    monkeypatch.setitem(runtimes.RUNTIMES, "openvino", replace(runtimes.RUNTIMES["openvino"], compiler=no))
    monkeypatch.setattr(runtimes, "_PAYS", 1)
    (done,) = run_extraction(["random"], dataset, home=tmp_path)
    assert done.store.runtime == "eager"
    with refused(UsageError, "runtime-refuses"):
        run_extraction(["random:1"], dataset, home=tmp_path, runtime="openvino")


def test_outside_fp32_the_runtime_is_part_of_the_recipe(
    dataset: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(runtimes, "cpu_flags", lambda: {"avx2"})
    with refused(UsageError, "runtime-unfit"):
        run_extraction(["random"], dataset, home=tmp_path, precision="bf16", runtime="openvino")
    # OpenVINO's bfloat16 needs a processor with it.
    monkeypatch.setattr(runtimes, "cpu_flags", lambda: {"amx_bf16"})
    monkeypatch.setattr(Compiled, "__call__", lambda self, images: self.network(images))
    (ours,) = run_extraction(["random"], dataset, home=tmp_path, precision="bf16")
    (other,) = run_extraction(["random"], dataset, home=tmp_path, precision="bf16", runtime="openvino")
    assert (ours.store.recipe.precision, other.store.recipe.precision) == ("bf16", "bf16+openvino")
    assert ours.store.path != other.store.path
    made = extraction.recipe_network(other.store.recipe)
    assert (made.precision, made.runtime) == ("bf16", "openvino")
    assert check_sample(other.store.path, dataset, 5).ok


def test_the_gate() -> None:
    eager = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert departure(eager + 2e-5, eager, "fp32") == ""
    assert departure(eager + 8e-5, eager, "fp32") != ""
    assert departure(eager * 1.5, eager, "bf16") == ""
    assert departure(eager.flip(1), eager, "bf16") != ""
    assert departure(eager * torch.nan, eager, "fp32") != ""


def test_torch_named_or_not_computes_in_bfloat16() -> None:
    loaded = load_tiny("random")
    transform = choose_transform(loaded.spec, "paper", {(40, 40)})
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    unnamed, named, exact = (
        freeze(loaded, transform, "cpu", precision).features(pixels) for precision in ("bf16", "bf16+eager", "fp32")
    )
    assert np.array_equal(unnamed, named)
    assert not np.array_equal(unnamed, exact)

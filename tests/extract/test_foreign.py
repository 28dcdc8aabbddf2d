"""Features made elsewhere: read from every format, matched by name, probed as the store's own."""

from __future__ import annotations

import csv
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

import embcache
import embcache.extract.recipes as run
from embcache.cli import app
from embcache.config import ImportConfig
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import DatasetError, EmbcacheError, StoreError, UsageError
from embcache.extract.foreign import import_features, import_file
from embcache.maintain.export import export_features
from embcache.maintain.gc import collect
from embcache.maintain.repair import check_sample, repair_store
from embcache.maintain.verify import verify_store
from embcache.probe.probe import probe_features
from embcache.results.predict import predict
from embcache.store.feature_store import FeatureStore, open_store
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny, run_extraction
from tests.maintain.conftest import damage, stamps
from tests.refusal import refused

DIM = 5


@pytest.fixture
def ds(images: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> ImageDataset:
    monkeypatch.setattr(run, "load_backbone", load_tiny)
    return load_dataset("folder", images)


def made(ds: ImageDataset, dtype: str = "float32") -> NDArray[Any]:
    """Features of a dataset's images, (n, DIM), that tell its classes apart a little."""
    values = np.random.default_rng(0).normal(size=(len(ds), DIM)) + ds.labels[:, None] / 2
    return values.astype(dtype)


def write(path: Path, ids: Iterable[str], features: Any, **more: Any) -> Path:
    np.savez(path, features=features, ids=np.array(list(ids)), **more)
    return path


def imported(file: Path, ds: ImageDataset, **options: Any) -> FeatureStore:
    return import_features(file, ds, backbone="mine", **options)


# From embcache itself


@pytest.mark.parametrize("name", ["f.npz", "f.parquet", "f.csv", "f.h5", "f.zarr"])
@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_exported_features_probe_as_the_stores_own(ds: ImageDataset, tmp_path: Path, name: str, format: str) -> None:
    own = run_extraction(["random"], ds)[0].store
    export_features(own, ds, tmp_path / name)
    store = imported(tmp_path / name, ds, format=format)
    assert np.array_equal(store.features[:], own.features[:])
    assert store.ids.tolist() == own.ids.tolist()
    mine, other = (
        probe_features(ds, [name], head="linear", subset="F", folds=2, save=False) for name in ("random", "mine")
    )
    assert [fold.score for fold in mine.folds] == [fold.score for fold in other.folds]
    assert store.recipe.foreign
    assert not verify_store(store.path).damage


def test_equal_features_are_one_store_and_others_another(ds: ImageDataset, tmp_path: Path) -> None:
    ids, x = ds.table["id"].tolist(), made(ds)
    store = imported(write(tmp_path / "a.npz", ids, x), ds)
    before = stamps(store.path)
    assert imported(tmp_path / "a.npz", ds).path == store.path
    assert imported(write(tmp_path / "b.npz", ids[::-1], x[::-1]), ds).path == store.path
    done = import_file(tmp_path / "a.npz", ds, "mine", ImportConfig())
    assert (done.added, done.matched_by, done.features) == (0, "ID", 20)
    assert stamps(store.path) == before
    other = import_file(write(tmp_path / "c.npz", ids, x + 1), ds, "mine", ImportConfig())
    assert other.store.path != store.path
    assert any(store.path.name in note for note in other.notes)
    assert import_features(tmp_path / "a.npz", ds, backbone="yours").path.name.startswith("yours-")


def test_rows_are_added_when_the_dataset_grew(ds: ImageDataset, images: Path, tmp_path: Path) -> None:
    ids = [*ds.table["id"].tolist(), "benign/98.png", "elsewhere/1.png"]
    x = np.random.default_rng(1).normal(size=(len(ids), DIM)).astype("float32")
    file = write(tmp_path / "a.npz", ids, x)
    done = import_file(file, ds, "mine", ImportConfig())
    assert (done.added, done.ignored) == (20, ("benign/98.png", "elsewhere/1.png"))
    draw(images / "benign" / "98.png", 98)
    grown = load_dataset("folder", images)
    with refused(StoreError, "features-incomplete") as caught:
        open_store("mine", grown).arrays(grown)
    assert f"embcache import {file}" in str(caught.value.fix)
    done = import_file(file, grown, "mine", ImportConfig())
    assert (done.added, done.ignored) == (1, ("elsewhere/1.png",))
    features, labels, _ = open_store("mine", grown).arrays(grown)
    assert np.array_equal(features, x[[ids.index(id_) for id_ in grown.table["id"]]])
    assert len(labels) == 21
    assert collect(done.store.path).freed == 0


def test_images_without_features_are_quarantined_up_to_max_bad(ds: ImageDataset, tmp_path: Path) -> None:
    ids, x = ds.table["id"].tolist(), made(ds)
    one = imported(write(tmp_path / "a.npz", ids[1:], x[1:]), ds)
    assert one.quarantined == {ids[0]: "no features were imported for it"}
    assert len(one) == 19
    file = write(tmp_path / "b.npz", ids[3:], x[3:])
    with refused(DatasetError, "import-incomplete") as caught:
        imported(file, ds)
    assert ids[0] in str(caught.value.found)
    assert len(imported(file, ds, max_bad=3).quarantined) == 3
    assert probe_features(ds, ["mine"], head="logreg", subset="F", folds=2, recipe=one.recipe.fingerprint[:12])


def test_an_interrupted_import_is_finished_by_the_next(
    ds: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.npz", ds.table["id"], made(ds))
    with monkeypatch.context() as patch:
        patch.setattr("embcache.extract.foreign.commit_shard", None)
        with pytest.raises(TypeError):
            imported(file, ds)
    store = open_store("mine", ds)
    assert (len(store), len(store.plans())) == (0, 1)
    assert len(imported(file, ds)) == 20
    assert len(FeatureStore(store.path).plans()) == 1


# Formats of others


def tables(ds: ImageDataset, folder: Path) -> dict[str, Path]:
    """The same features as tables of several kinds."""
    ids, x = ds.table["id"].tolist(), made(ds)
    columns = {f"emb_{k}": x[:, k] for k in range(DIM)}
    pq.write_table(pa.table({"image_id": ids, "label": ds.labels, **columns}), folder / "wide.parquet")
    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), DIM)
    pq.write_table(pa.table({"path": ids, "embedding": lists}), folder / "fixed.parquet")
    pq.write_table(pa.table({"path": ids, "age": ds.labels, "v": list(x)}), folder / "list.parquet")
    pd.DataFrame({"filename": ids, **columns}).to_csv(folder / "wide.csv", index=False, sep=";")
    pd.DataFrame({"id": ids, "features": [str(row.tolist()) for row in x]}).to_csv(folder / "list.csv", index=False)
    pd.DataFrame({"id": ids, "label": ds.labels, **dict(zip("abcde", x.T, strict=True))}).to_csv(
        folder / "named.tsv", index=False, sep="\t"
    )
    return {path.name: path for path in sorted(folder.glob("*.*"))}


@pytest.mark.parametrize("name", ["wide.parquet", "fixed.parquet", "list.parquet", "wide.csv", "list.csv", "named.tsv"])
def test_tables_of_others(ds: ImageDataset, tmp_path: Path, name: str) -> None:
    store = imported(tables(ds, tmp_path)[name], ds)
    assert np.array_equal(store.features[:], made(ds))


def test_ids_of_a_table_keep_their_zeros(images: Path, home: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    for k in range(4):
        draw(flat / ("a" if k % 2 else "b") / f"00{k}.png", k)
    ds = load_dataset("folder", flat)
    (tmp_path / "x.csv").write_text("id,f0,f1\n" + "".join(f"00{k},{k}.5,1\n" for k in range(4)))
    done = import_file(tmp_path / "x.csv", ds, "mine", ImportConfig())
    assert done.matched_by == "file name without suffix"
    rows = {Path(id_).stem: row[0] for id_, row in zip(done.store.ids.tolist(), done.store.features[:], strict=True)}
    assert rows == {f"00{k}": k + 0.5 for k in range(4)}


@pytest.mark.parametrize("suffix", [".txt", ".csv"])
def test_arrays_with_their_names_in_another_file(ds: ImageDataset, tmp_path: Path, suffix: str) -> None:
    np.save(tmp_path / "x.npy", made(ds))
    names = (tmp_path / "names").with_suffix(suffix)
    header = "path,n\n" if suffix == ".csv" else ""
    names.write_text(header + "".join(f"{id_}{',1' * bool(header)}\n" for id_ in ds.table["id"]))
    assert np.array_equal(imported(tmp_path / "x.npy", ds, ids=names).features[:], made(ds))
    with refused(DatasetError, "features-without-ids") as caught:
        imported(tmp_path / "x.npy", ds)
    assert caught.value.found == f"{len(ds):,} rows without names"
    names.write_text("path\none.png\n")
    with refused(DatasetError, "features-count"):
        imported(tmp_path / "x.npy", ds, ids=names)


def slides(folder: Path, ds: ImageDataset, patches: bool) -> Path:
    """HDF5 files as TRIDENT's save_h5 writes them: features in growing chunks, coordinates beside them."""
    rng = np.random.default_rng(3)
    for k, (path, row) in enumerate(zip(ds.table["path"], made(ds), strict=True)):
        target = folder / (Path(path).stem + ".h5")
        target.parent.mkdir(parents=True, exist_ok=True)
        values = rng.normal(size=(k % 3 + 2, DIM)).astype("float32") if patches else row
        with h5py.File(target, "w") as file:
            shape = (None, *values.shape[1:])
            file.create_dataset("features", data=values, maxshape=shape, chunks=(1, *values.shape[1:]))
            file["features"].attrs["name"] = target.stem
            file.create_dataset("coords", data=np.zeros((4, 2), np.int64), chunks=(1, 2), maxshape=(None, 2))
    return folder


def test_slides_of_trident(ds: ImageDataset, tmp_path: Path) -> None:
    done = import_file(slides(tmp_path / "slides", ds, patches=False), ds, "titan", ImportConfig())
    assert np.array_equal(done.store.features[:], made(ds))
    assert done.matched_by == "file name without suffix"
    with refused(DatasetError, "features-not-found"):
        imported(next((tmp_path / "slides").glob("*.h5")), ds)


def test_patches_of_trident_are_averaged_only_where_that_is_said(ds: ImageDataset, tmp_path: Path) -> None:
    folder = slides(tmp_path / "patches", ds, patches=True)
    with refused(DatasetError, "features-several"):
        imported(folder, ds)
    store = imported(folder, ds, mean=True)
    for id_, row in zip(store.ids.tolist(), store.features[:], strict=True):
        with h5py.File(folder / (Path(id_).stem + ".h5")) as file:
            assert np.allclose(row, file["features"][:].mean(0), atol=1e-6)


def tensors(folder: Path, ds: ImageDataset, **how: Any) -> Path:
    """A folder as kaiko-eva's writer leaves it: a list of one tensor per image, and a manifest."""
    with_list, dtype = how.get("list", True), how.get("dtype", torch.float32)
    folder.mkdir()
    with (folder / "manifest.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["origin", "embeddings", "target", "split"])
        for path, label, values in zip(ds.table["path"], ds.labels, made(ds), strict=True):
            name = os.path.splitext(path)[0] + ".pt"  # noqa: PTH122  # as eva has it
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            tensor = torch.from_numpy(values).to(dtype)
            torch.save([tensor] if with_list else tensor, folder / name)
            rows.writerow([path, name, label, "train"])
    return folder


@pytest.mark.parametrize("how", [{}, {"list": False}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}])
def test_tensors_of_eva(ds: ImageDataset, tmp_path: Path, how: dict[str, Any]) -> None:
    store = imported(tensors(tmp_path / "eva", ds, **how), ds)
    expected = torch.from_numpy(made(ds)).to(how.get("dtype", torch.float32))
    assert np.array_equal(store.features[:].astype("float32"), expected.float().numpy())
    assert str(store.dtype) == ("float16" if expected.dtype == torch.float16 else "float32")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "eva"])
def test_python_objects_are_never_loaded(
    ds: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    objects = np.array([Evil()] * len(ds), dtype=object)
    if name == "x.npy":
        np.save(tmp_path / name, objects)
    elif name == "x.npz":
        write(tmp_path / name, ds.table["id"], objects)
    else:
        path = next(tensors(tmp_path / name, ds).rglob("*.pt"))
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(DatasetError) as caught:
        imported(tmp_path / name, ds)
    assert caught.value.code in ("features-unsafe", "features-unreadable")
    assert not (tmp_path / "harm").exists()


def test_a_manifest_that_leads_elsewhere_is_refused(ds: ImageDataset, tmp_path: Path) -> None:
    folder = tensors(tmp_path / "eva", ds)
    torch.save(torch.zeros(DIM), tmp_path / "other.pt")
    manifest = folder / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("benign/01.pt", "../other.pt"))
    with refused(DatasetError, "outside-root"):
        imported(folder, ds)


# What names mean


@pytest.mark.parametrize(
    ("rule", "how"),
    [
        ("ID", lambda path, root: path),
        ("path", lambda path, root: f"{root}/{path}"),
        ("path", lambda path, root: path.replace("/", "\\")),
        ("ID or path without suffix", lambda path, root: path.replace(".png", ".jpeg")),
        ("file name without suffix", lambda path, root: "elsewhere/" + Path(path).name),
    ],
)
def test_names_are_ids_paths_or_either_without_suffix(ds: ImageDataset, tmp_path: Path, rule: str, how: Any) -> None:
    names = [how(path, ds.root) for path in ds.table["path"]]
    done = import_file(write(tmp_path / "a.npz", names, made(ds)), ds, "mine", ImportConfig())
    assert done.matched_by == rule
    assert np.array_equal(done.store.features[:], made(ds))


@pytest.mark.parametrize("case", ["two names", "two images"])
def test_ambiguous_names_are_refused(ds: ImageDataset, images: Path, tmp_path: Path, case: str) -> None:
    stems = [path.removesuffix(".png") for path in ds.table["path"]]
    if case == "two images":
        draw(images / "benign" / "00.png", 70)  # as is malignant/00.png
        names, ds = [Path(stem).name for stem in stems], load_dataset("folder", images)
    else:
        names = [*(f"{stem}.jpg" for stem in stems[1:]), f"{stems[1]}.tif"]
    with refused(DatasetError, "import-ambiguous"):
        imported(write(tmp_path / "a.npz", names, np.zeros((20, DIM), "float32")), ds)


X = np.ones((20, DIM), "float32")
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "no name in common": ("import-no-match", {"ids": [f"x{k}" for k in range(20)]}),
    "an id twice": ("duplicate-ids", {"ids": ["a"] * 20}),
    "not finite": ("features-not-finite", {"features": np.where(np.eye(20, DIM) > 0, np.nan, X)}),
    "too large for float32": ("features-not-finite", {"features": X.astype("f8") * 1e300}),
    "whole numbers": ("features-dtype", {"features": X.astype("int64")}),
    "fewer rows": ("features-count", {"features": X[:3]}),
    "one axis": ("features-ragged", {"features": X[:, 0]}),
    "maps": ("features-ragged", {"features": np.ones((20, 2, 3, 4), "f4")}),
    "no columns": ("features-ragged", {"features": np.ones((20, 0), "f4")}),
    "views": ("features-several", {"features": np.ones((20, 2, 4), "f4")}),
    "an empty id": ("cell-not-text", {"ids": ["", *map(str, range(19))]}),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_a_vector_per_image_is_refused(ds: ImageDataset, home: Path, tmp_path: Path, what: str) -> None:
    code, changes = BAD[what]
    with refused(DatasetError, code):
        imported(write(tmp_path / "a.npz", **{"ids": ds.table["id"], "features": X, **changes}), ds)
    assert not list(home.rglob("recipe.json"))


def test_a_damaged_file_is_named(ds: ImageDataset, tmp_path: Path) -> None:
    whole = write(tmp_path / "a.npz", ds.table["id"], X).read_bytes()
    for name, data in {"a.npz": whole[:-60], "b.h5": b"\x89HDF\r\n\x1a\n", "c.parquet": b"PAR1", "d.csv": b"\xff\xfe\0",
                       "e.npy": b"\x93NUMPY", "f.csv": b"id,f0,f1\na,1\n"}.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
        with refused(DatasetError, "features-unreadable"):
            imported(tmp_path / name, ds)
    ragged = pa.table({"id": ds.table["id"].tolist(), "x": [[1.0]] + [[1.0, 2.0]] * 19})
    pq.write_table(ragged, tmp_path / "g.parquet")
    with refused(DatasetError, "features-ragged"):
        imported(tmp_path / "g.parquet", ds)
    pq.write_table(
        pa.table({"id": ["a"], **{f"v{v}_f{k}": [1.0] for v in "01" for k in "012"}}), tmp_path / "h.parquet"
    )
    with refused(DatasetError, "features-several"):
        imported(tmp_path / "h.parquet", ds)
    with h5py.File(tmp_path / "i.h5", "w") as file:
        file["ids"], file["features"] = ["a"], h5py.ExternalLink("b.h5", "x")
    with refused(DatasetError, "array-elsewhere"):
        imported(tmp_path / "i.h5", ds)


def test_float64_is_narrowed_and_said(ds: ImageDataset, tmp_path: Path) -> None:
    file = write(tmp_path / "a.npz", ds.table["id"], made(ds, "float64"))
    done = import_file(file, ds, "mine", ImportConfig())
    assert done.store.dtype == np.float32
    assert any("float64 is stored as float32" in note for note in done.notes)
    assert imported(write(tmp_path / "b.npz", ds.table["id"], made(ds, "float16")), ds).dtype == np.float16


# What cannot be done with them


def test_imported_features_are_neither_extracted_nor_computed_again_nor_predicted(
    ds: ImageDataset, images: Path, tmp_path: Path
) -> None:
    store = imported(write(tmp_path / "a.npz", ds.table["id"], made(ds)), ds)
    for name in ("random", "timm:resnet18", "a b", "mine=random"):
        with refused(UsageError, "import-name"):
            import_features(tmp_path / "a.npz", ds, backbone=name)
    with refused(UsageError, "foreign-features"):
        run_extraction(["mine"], ds)
    with refused(UsageError, "unknown-backbone"):
        run_extraction(["no-such"], ds)
    with refused(UsageError, "foreign-features"):
        check_sample(store.path, ds, 3)
    result = probe_features(ds, ["mine"], head="logreg", subset="F", folds=2)
    with refused(UsageError, "foreign-features"):
        predict(result.id, [images])
    damage(next(path for path in (store.path / "shards" / "000000").rglob("features/c/**/*") if path.is_file()), "flip")
    with refused(StoreError, "foreign-features") as caught:
        repair_store(verify_store(store.path), lambda: ds)
    assert "embcache import" in str(caught.value.fix)


def test_the_command(ds: ImageDataset, images: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.npz", [*ds.table["id"], "b/1.png"], np.vstack([made(ds), made(ds)[:1]]))
    words = ["import", str(file), "--backbone-name", "mine", "--dataset", "folder", "--data-root", str(images)]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "20 of 20 images" in shown.output
    assert "1 names" in shown.output
    answer = json.loads(CliRunner().invoke(app, [*words, "--json", "-"]).stdout)
    assert (answer["added"], answer["ignored"], answer["matched_by"]) == (0, ["b/1.png"], "ID")
    checked = CliRunner().invoke(app, ["verify", "--source", "--sample", "3"])
    assert checked.exit_code == 0, checked.output
    assert "skipped: the features were imported" in checked.output
    assert embcache.import_features is import_features
    with refused(UsageError, "no-features-file"):
        imported(tmp_path / "none.npz", ds)
    with refused(UsageError, "features-format"):
        imported(images, ds)
    with refused(UsageError, "unused-option"):
        imported(tables(ds, tmp_path)["wide.csv"], ds, ids=file)
    with pytest.raises(EmbcacheError):
        imported(file, ds, max_bad="many")

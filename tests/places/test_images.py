"""Images that a table names by their addresses in an object store."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from embcache import places
from embcache.config import DatasetRef
from embcache.data import files
from embcache.data.budget import Budget
from embcache.data.dataset import ImageDataset, find_dataset, load_dataset
from embcache.data.files import FileState, stat_files
from embcache.data.images import ImageRef, read_image, read_size
from embcache.data.partitioned import load_partitioned
from embcache.errors import DatasetError, EmbcacheError, ImageError, StoreError, UsageError
from embcache.extract import recipes
from embcache.extract import scan as scanning
from embcache.maintain.verify import check_source, digest_now
from embcache.places import ObjectPlace, Place, open_place
from embcache.results.predict import list_images
from embcache.store.feature_store import FeatureStore
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny, run_extraction
from tests.places.conftest import RATES
from tests.places.faults import FaultProxy
from tests.refusal import refused

pytest.importorskip("obstore")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each object is read."""
    counts, get = Counter[str](), ObjectPlace.get

    def counted(self: ObjectPlace, key: str, most: int | None = None) -> bytes:
        counts[key] += 1
        return get(self, key, most)

    monkeypatch.setattr(ObjectPlace, "get", counted)
    return counts


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "load_backbone", load_tiny)
    # Objects that were written just now count as long settled, as they cannot be written again unseen.
    monkeypatch.setattr(scanning, "TICK_NS", -(10**12))


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A table of images on disk."""
    rows = ["path,label,group"]
    for k in range(10):
        draw(tmp_path / "disk" / f"bé {k % 3}" / f"{k}.png", k, 40 + k % 2)
        rows.append(f"bé {k % 3}/{k}.png,{'ab'[k % 2]},p{k}")
    (tmp_path / "disk" / "labels.csv").write_text("\n".join(rows) + "\n", "utf-8")
    return tmp_path / "disk" / "labels.csv"


def upload(local: Path, url: str, table: Path) -> Place:
    """Store the images under a URL, and write the table of their addresses."""
    bucket, _, prefix = url.partition("://")[2].partition("/")
    place = open_place(f"{url.partition('://')[0]}://{bucket}")
    header, *rows = local.read_text("utf-8").splitlines()
    for row in rows:
        path = row.partition(",")[0]
        place.put(f"{prefix}/{path}", (local.parent / path).read_bytes())
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("\n".join([header, *(f"{url}/{row}" for row in rows)]) + "\n", "utf-8")
    return place


@pytest.fixture
def table(local: Path, tmp_path: Path) -> Path:
    """A table of the same images in memory, under ``memory://NAME/pictures``."""
    upload(local, f"memory://{tmp_path.name}/pictures", tmp_path / "remote" / "labels.csv")
    return tmp_path / "remote" / "labels.csv"


def load(table: Path, **options: object) -> ImageDataset:
    return load_dataset("folder", table, ref=DatasetRef.make(options={"name": table.parent.name, **options}))


def features(dataset: ImageDataset, home: Path) -> dict[str, np.ndarray]:
    (found,) = run_extraction(["random"], dataset, home=home)
    return by_name(found.store)


def by_name(store: FeatureStore) -> dict[str, np.ndarray]:
    return {id_.rpartition("/")[2]: row for id_, row in zip(store.ids.tolist(), np.array(store.features), strict=True)}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_features_are_those_of_the_files(local: Path, table: Path, tmp_path: Path, reads: Counter[str]) -> None:
    here = features(load(local), tmp_path / "home")
    there = features(load(table), tmp_path / "home")
    assert equal(here, there)
    reads.clear()
    assert equal(here, features(load(table), tmp_path / "home"))
    assert not reads  # a listing tells that nothing changed


def test_features_through_faults(
    local: Path, bucket: str, proxy: FaultProxy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "remote" / "labels.csv"
    upload(local, f"{bucket}/pictures", table)
    # Nothing tells of a bit that flipped in an image that someone else has stored.
    proxy.rates = {kind: 2 * rate for kind, rate in RATES.items() if kind != "flipped"}
    assert equal(features(load(table), tmp_path / "home"), features(load(local), tmp_path / "home"))
    assert proxy.faults
    print(proxy.totals())
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert kept
    assert not any(b"hunter2" in path.read_bytes() for path in kept)
    out, err = capfd.readouterr()
    assert "hunter2" not in out + err


def test_a_changed_object_is_extracted_again(table: Path, tmp_path: Path, reads: Counter[str]) -> None:
    home, dataset = tmp_path / "home", load(table)
    before = features(dataset, home)
    place, key = open_place(f"memory://{tmp_path.name}"), "pictures/bé 0/3.png"
    draw(tmp_path / "other.png", 99, 41)
    place.put(key, (tmp_path / "other.png").read_bytes())
    reads.clear()
    after = features(load(table), home)
    assert [name for name in before if not np.array_equal(before[name], after[name])] == ["3.png"]
    assert set(reads) == {key}


def test_an_object_that_is_written_anew_with_the_same_bytes_is_not_extracted(
    table: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    home = tmp_path / "home"
    features(load(table), home)
    place, key = open_place(f"memory://{tmp_path.name}"), "pictures/bé 0/3.png"
    place.put(key, place.get(key))
    reads.clear()
    (found,) = run_extraction(["random"], load(table), home=home)
    assert found.computed == 0
    assert set(reads) <= {key}


def test_missing_objects_are_missing_files(table: Path, tmp_path: Path) -> None:
    open_place(f"memory://{tmp_path.name}").delete("pictures/bé 1/4.png")
    with refused(DatasetError, "images-missing") as caught:
        load(table)
    assert "bé 1/4.png" in str(caught.value.found)
    dataset = load(table, allow_missing=True)
    assert len(dataset) == 9
    assert dataset.missing == (f"memory://{tmp_path.name}/pictures/bé 1/4.png",)
    with pytest.raises(ImageError) as error:
        read_image(table.parent, dataset.missing[0])
    assert error.value.code == "image-missing"


def test_source_check(table: Path, tmp_path: Path) -> None:
    (found,) = run_extraction(["random"], dataset := load(table), home=tmp_path / "home")
    assert check_source(found.store, dataset).ok
    place = open_place(f"memory://{tmp_path.name}")
    place.put("pictures/bé 0/0.png", place.get("pictures/bé 1/1.png"))
    place.delete("pictures/bé 2/2.png")
    checked = check_source(found.store, dataset)
    assert [id_[-5:] for id_ in (*checked.changed, *checked.missing)] == ["0.png", "2.png"]


def test_sizes_and_pixels_of_every_decoder(tmp_path: Path) -> None:
    from PIL import Image

    place, rng = open_place(f"memory://{tmp_path.name}"), np.random.default_rng(0)
    for suffix in ("png", "jpg", "tif", "bmp", "webp"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
        place.put(f"x/a.{suffix}", path.read_bytes())
        url = f"memory://{tmp_path.name}/x/a.{suffix}"
        assert read_size(tmp_path, url) == read_size(tmp_path, path.name) == (40, 30)
        (there, digest), (here, same) = read_image(tmp_path, url), read_image(tmp_path, path.name)
        assert digest == same
        assert np.array_equal(there, here)


def test_dicom(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from tests.data.test_dicom import dicom

    place, data = open_place(f"memory://{tmp_path.name}"), dicom(np.arange(300, dtype=np.uint16).reshape(15, 20))
    for name in ("x/1.dcm", "x/IM000001"):  # known by its content too
        place.put(name, data)
        (tmp_path / "file.dcm").write_bytes(data)
        url = f"memory://{tmp_path.name}/{name}"
        assert read_size(tmp_path, url) == (20, 15)
        assert np.array_equal(read_image(tmp_path, url)[0], read_image(tmp_path, "file.dcm")[0])


def test_a_folder_on_disk_never_stands_for_an_object(tmp_path: Path) -> None:
    draw(tmp_path / "memory:" / "absent" / "a.png", 0)
    url = "memory://absent/a.png"
    assert dict(stat_files(tmp_path, [url])) == {url: None}
    with pytest.raises(ImageError):
        read_image(tmp_path, url)


def test_images_within_an_object_are_refused(tmp_path: Path) -> None:
    with refused(DatasetError, "container-remote"):
        read_image(tmp_path, "memory://some/array.npy", "3")


@pytest.mark.parametrize(
    "address",
    ["s3://bucket", "s3://bucket/", "s3:///key.png", "s3://bucket/a//b.png", "gs://b/../c.png", "az://c/./a.png",
     "s3://AKIA:hunter2@bucket/a.png", "s3://bucket:80/a.png"],
)  # fmt: skip
def test_addresses_that_name_no_object_are_refused(address: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"path,label\n{address},a\n", "utf-8")
    with refused(UsageError, "place-address") as caught:
        load_dataset("folder", tmp_path / "t.csv")
    assert "hunter2" not in str(caught.value)


def test_objects_are_found_by_few_listings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PASSED", 3)
    monkeypatch.setattr(files, "_LOOKED_AT", 7)
    rng, url = random.Random(3), f"memory://{tmp_path.name}"
    place = open_place(url)
    names = [f"{a}{b}{c}.png" for a in ("", "p/", "p-q/", "p/q/", "z/.") for b in "0aé" for c in range(12)]
    for name in names:
        place.put(name, name.encode())
    for size in (1, 2, 5, 40, len(names)):
        asked = rng.sample(names, size)
        absent = [f"{url}/{rng.choice(names)}{end}" for end in ("x", ".png", "/below")]
        found = dict(stat_files(tmp_path, [f"{url}/{name}" for name in asked] + absent))
        assert {path for path, state in found.items() if state is None} == set(absent)
        assert all(found[f"{url}/{name}"][0] == len(name.encode()) for name in asked)  # type: ignore[index]


def test_states_tell_objects_apart_that_are_written_in_one_second(bucket: str, tmp_path: Path) -> None:
    place, url = open_place(bucket), f"{bucket}/key"

    def state() -> FileState | None:
        return dict(stat_files(tmp_path, [url]))[url]

    place.put("key", b"one")
    first = state()
    assert first == state()
    place.put("key", b"two")
    assert first != state()


@pytest.mark.usefixtures("impatient")
def test_probing_goes_on_from_the_snapshot(local: Path, bucket: str, proxy: FaultProxy, tmp_path: Path) -> None:
    table, home = tmp_path / "remote" / "labels.csv", tmp_path / "home"
    upload(local, f"{bucket}/pictures", table)
    features(load(table), home)
    assert find_dataset("remote", home=home)[1] == "live"
    proxy.rates = {"503": 1.0}
    found, state = find_dataset("remote", home=home)
    assert state == "snapshot"
    assert len(found) == 10
    with refused(StoreError, "place-unavailable"):
        load(table)


def test_prediction_of_single_objects_is_refused(table: Path, tmp_path: Path) -> None:
    for named in (Path("s3://bucket/a.png"), table):
        with refused(UsageError, "objects-not-predicted"):
            list_images([named], [])


def test_without_obstore(table: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with refused(EmbcacheError, "cloud-missing"):  # type: ignore[type-abstract]
        read_image(tmp_path, "s3://never-opened/a.png")


def test_tables_that_are_kept_in_partitions(local: Path, table: Path, tmp_path: Path, reads: Counter[str]) -> None:
    home = tmp_path / "home"
    (tmp_path / "large").mkdir()
    pd.read_csv(table).to_parquet(tmp_path / "large" / "t.parquet")
    for _ in range(2):
        dataset = load_partitioned(tmp_path / "large" / "t.parquet", home=home, rows=4, name="large")
        reads.clear()
        found = [run_extraction(["random"], part, home=home)[0] for part in dataset.parts()]
    assert not reads
    there = {name: row for each in found for name, row in by_name(each.store).items()}
    assert equal(there, features(load(local), home))


@pytest.mark.parametrize("asked", ["study/5", "study/59999", "ids/z", "study/5 ids/z study/absent"])
def test_objects_behind_very_many_others_are_found(asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PASSED", 3)
    url = f"memory://{tmp_path.name}"
    place = open_place(url)
    for name in ("ids/z", *(f"{folder}/{k}" for folder in ("ids", "study") for k in range(59990, 60000)), "study/5"):
        place.put(name, b"x")
    found = dict(stat_files(tmp_path, [f"{url}/{name}" for name in asked.split()]))
    assert [path for path, state in found.items() if state is None] == [f"{url}/study/absent"] * ("absent" in asked)


def test_an_object_is_not_read_before_its_size_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, held = f"memory://{tmp_path.name}/a.png", list[int | None]()
    draw(tmp_path / "a.png", 1)
    size = (tmp_path / "a.png").stat().st_size
    open_place(f"memory://{tmp_path.name}").put("a.png", (tmp_path / "a.png").read_bytes())
    hold = Budget.hold

    def counted(self: Budget, need: int | None = None) -> AbstractContextManager[None]:
        held.append(need)
        return hold(self, need)

    monkeypatch.setattr(Budget, "hold", counted)
    monkeypatch.setattr(files, "LARGE_FILE", size - 1)
    assert np.array_equal(read_image(tmp_path, url)[0], read_image(tmp_path, "a.png")[0])
    held.clear()
    assert read_size(tmp_path, url) == read_size(tmp_path, "a.png")
    assert digest_now(tmp_path, ImageRef("a", url, "")) == sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    assert held == [None, None]
    monkeypatch.setattr(files, "LARGEST_FILE", size - 1)
    monkeypatch.setattr(places, "crc32c", lambda data: pytest.fail("the object was read"))
    for read in (read_image, read_size):
        with pytest.raises(ImageError, match=f"too large: a file of {size:,} bytes, more than") as error:
            read(tmp_path, url)
        assert error.value.code == "image-too-large"
    assert digest_now(tmp_path, ImageRef("a", url, "")) == ""

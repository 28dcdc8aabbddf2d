import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from embcache.commands.start import datasets
from embcache.config import DatasetRef
from embcache.data.dataset import list_datasets, load_dataset, survey_dataset
from embcache.errors import DatasetNotFoundError
from embcache.paths import slug
from tests.data import test_nih, test_nih_findings, test_patchcam
from tests.data.pictures import write_image
from tests.refusal import refused

app = typer.Typer()
app.command()(datasets)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture
def nih(home: Path) -> Path:
    root = test_nih.write_layout(home.parent / "data" / "nih")
    (root / "images_001" / "images" / "01_001.png").unlink()
    return root


def keep_folder(home: Path, tmp_path: Path) -> str:
    for i, name in enumerate(["cat/a.png", "dog/b.png"]):
        write_image(tmp_path / "pets" / name, i)
    ds = load_dataset("folder", tmp_path / "pets")
    (home / slug(ds.name)).mkdir(parents=True)
    (home / slug(ds.name) / "dataset.parquet").write_bytes(ds.to_parquet_bytes())
    return ds.name


def test_a_survey_keeps_rows_whose_images_are_missing(nih: Path) -> None:
    found = survey_dataset("nih")
    assert (len(found), found.missing) == (5, ("images/01_001.png",))


def test_findings_are_counted_with_and_without(tmp_path: Path) -> None:
    test_nih_findings.write_layout(tmp_path)
    shown = run("nih-findings", "--data-root", str(tmp_path))
    assert re.search(r"fracture +1 / 3 +1 / 2\n", shown)
    assert re.search(r"images +4 +3\n", shown)
    data = json.loads(run("nih-findings", "--data-root", str(tmp_path), "--json", "-"))
    assert data["classes"]["nodule or mass"] == {"train": 2, "test": 1}
    assert data["absent"]["nodule or mass"] == {"train": 2, "test": 2}


def test_a_survey_of_labels_alone_is_no_error(tmp_path: Path) -> None:
    test_nih.write_labels(tmp_path)
    found = survey_dataset("nih", DatasetRef(data_root=tmp_path))
    assert len(found.missing) == len(found) == 5


def test_surveying_draws_nothing(home: Path) -> None:
    with refused(DatasetNotFoundError, "dataset-layout"):
        survey_dataset("sample")
    list_datasets()
    assert not (home / "sample-images").exists()


def test_a_cached_dataset_is_listed_and_its_snapshot_serves_when_it_is_gone(home: Path, tmp_path: Path) -> None:
    name = keep_folder(home, tmp_path)
    found = {row.name: row.found for row in list_datasets()}[name]
    assert found is not None
    assert (len(found), found.missing) == (2, ())
    assert "cat, dog" in run()
    (tmp_path / "pets").rename(tmp_path / "moved")
    (tmp_path / "pets").mkdir()  # emptied is as good as gone
    gone = survey_dataset(name)
    assert set(gone.missing) == {"cat/a.png", "dog/b.png"}
    assert any("snapshot" in note for note in gone.notes)


def test_the_list_tells_what_is_broken_and_goes_on(nih: Path, home: Path) -> None:
    test_patchcam.write_layout(home.parent / "data" / "patchcam")
    (home.parent / "data" / "patchcam" / "train_labels.csv").write_text("id,label\naa,7\n")
    (home / "x").mkdir(parents=True)
    (home / "x" / "dataset.parquet").write_bytes(b"damaged")
    rows = {row.name: row for row in list_datasets()}
    assert rows["nih"].found is not None
    assert rows["patchcam"].problem == "unknown label in 1 rows"
    assert (rows["aptos"].found, rows["aptos"].problem) == (None, "")


def test_the_list_shows_what_is_there_where_and_how_to_get_the_rest(nih: Path) -> None:
    text = run()
    (line,) = [line for line in text.splitlines() if line.startswith("nih ")]
    assert "4 of 5" in line
    assert str(nih) in line
    assert "kagglehub.dataset_download('paultimothymooney/chest-xray-pneumonia')" in text
    assert "drawn at first use" in text


def test_one_dataset_in_full(nih: Path) -> None:
    lines = run("nih").splitlines()
    cells = {line.split("  ")[0]: line.split()[-4:] for line in lines if line and not line.startswith("·")}
    assert cells["images"] == ["3", "2", "2", "2"]
    assert cells["fracture"] == ["1", "0", "0", "0"]
    assert cells["groups"][-2:] == ["2", "2"]
    assert any("more than one of the four findings" in line for line in lines)
    assert any("1 images are not there: images/01_001.png" in line for line in lines)


def test_json_holds_the_same_counts(nih: Path) -> None:
    data = json.loads(run("nih", "--json", "-"))
    assert data["classes"]["fracture"] == {"train": 1, "test": 0}
    assert data["classes_found"]["fracture"] == {"train": 0, "test": 0}
    assert data["missing"] == ["images/01_001.png"]
    assert (data["images"], data["images_found"]) == (5, 4)
    rows = {row["name"]: row for row in json.loads(run("--json", "-"))}
    assert rows["nih"]["images_found"] == 4
    assert rows["aptos"]["found"] is False

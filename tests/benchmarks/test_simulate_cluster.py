"""The simulated cluster: `simulate` itself verifies each store, image by image and commit by commit."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("obstore")

from benchmarks.partitions import make_table
from benchmarks.simulate_cluster import Options, simulate

IMAGES = 20_000


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("simulated") / "images"
    make_table(root, IMAGES, places=True)
    return root / "images.parquet"


def test_eight_equal_workers_have_no_more_to_do_than_the_images(table: Path, tmp_path: Path) -> None:
    options = Options(workers=8, rows_per_shard=512)
    found = simulate(table, tmp_path / "home", "even", options)
    assert (found.images, found.shards) == (IMAGES, 40)
    assert (found.in_vain, found.twice, found.reruns, found.fates.total()) == (0, 0, 0, 0)
    # Forty shards are five for each; the sixth turn of some is not there, and all of them open their networks first.
    fewest = IMAGES / 8 / options.rate
    assert fewest < 3600 * found.hours < fewest + 40
    assert found.utilization == pytest.approx(fewest / (3600 * found.hours), rel=1e-6)


def test_everything_at_once_loses_no_image_and_takes_longer(table: Path, tmp_path: Path) -> None:
    options = Options(workers=8, rows_per_shard=512, life=0.1, limit=20.0)
    found = simulate(table, tmp_path / "home", "all", options)
    assert (found.images, found.shards) == (IMAGES, 40)
    assert found.fates["lost"] >= 1
    assert found.in_vain > 0
    assert found.utilization < 0.75

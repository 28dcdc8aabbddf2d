"""What a store owes for a partition is what `plan_store` finds for a table, whatever happened before."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embcache.data.dataset import ImageDataset
from embcache.data.partitioned import load_partitioned
from embcache.extract.quarantine import LEFT
from embcache.extract.scan import DatasetFiles, Plan, plan_store, scan_images, scan_part
from embcache.store.commit import ShardRows, commit_shard
from embcache.store.feature_store import FeatureStore
from tests.store.build import make_store

NAMES = [f"{k:02d}.png" for k in range(40)]
NOT_READ, BROKEN = b"no digest", b"broken"

changes = st.tuples(
    st.sampled_from(["write", "exchange", "touch", "remove", "drop", "add"]),
    st.integers(0, 39),
    st.sampled_from([b"x", b"yy", b"zz", BROKEN, NOT_READ]),
)
History = list[tuple[list[tuple[str, int, bytes]], bool, str, bool]]
steps = st.tuples(
    st.lists(changes, max_size=4), st.booleans(), st.sampled_from(["nothing", "first", "all"]), st.booleans()
)


class Side:
    """One home, with its store, planned as a whole table or as a partition."""

    def __init__(self, folder: Path, root: Path, partition: bool) -> None:
        self.folder, self.root, self.partition = folder, root, partition
        self.store = FeatureStore(make_store(folder, rows_per_shard=17, row_shape=(1,)))
        self.files: DatasetFiles | None = None
        self.plan = Plan((), 0, 0, 0)

    def look(self, table: Path, retry: bool, keep: bool, pool: Executor) -> Plan:
        dataset: ImageDataset
        if self.partition:
            dataset = next(load_partitioned(table, name="ds", home=self.folder).parts())
            scan = scan_part(dataset, self.root, None, pool)
        else:
            frame = pd.read_parquet(table)
            full = frame.assign(place="", label=-1, group=frame["id"], split="train")
            dataset = ImageDataset("ds", self.root, (), "auc", "generic", full)
            scan = scan_images(dataset, self.root, None, pool)
        self.files = DatasetFiles(self.root, self.folder / "ds", scan, (), dataset.part)
        self.files.recall()
        self.plan = plan_store(self.store, dataset, scan, retry_quarantined=retry)
        if keep:
            self.files.keep()
        return self.plan

    def commit(self, shards: int, ids: Sequence[str]) -> None:
        for shard in self.plan.shards[:shards]:
            digests, reasons = [], []
            for id_ in shard.ids:
                content = (self.root / id_).read_bytes() if id_ in ids and (self.root / id_).exists() else None
                bare = content is None or content.startswith(NOT_READ)
                digests.append("" if bare else hashlib.sha256(content or b"").hexdigest())
                missing = "the file is not there" if id_ in ids else LEFT
                broken = bare or (content or b"").startswith(BROKEN)
                reasons.append(missing if content is None else "it is broken" if broken else "")
            valid = np.array([not reason for reason in reasons])
            features = np.ones((len(shard.ids), 1), np.float32)
            commit_shard(self.store.path, shard.number, ShardRows(shard.ids, features, valid, (*digests,), (*reasons,)))

    def check(self, ids: Sequence[str]) -> None:
        """A row that is not owed was made of the bytes that are there."""
        live = self.store.sources()
        for id_ in {*ids} - self.owed(ids):
            if digest := live[id_].digest:
                assert digest == hashlib.sha256((self.root / id_).read_bytes()).hexdigest()

    def owed(self, ids: Sequence[str]) -> set[str]:
        return {id_ for shard in self.plan.shards for id_ in shard.ids} & {*ids}


@settings(max_examples=25)
@given(st.lists(steps, min_size=1, max_size=5))
def test_a_partition_owes_what_a_table_owes(
    history: list[tuple[list[tuple[str, int, bytes]], bool, str, bool]],
) -> None:
    quick, temporary = pytest.MonkeyPatch.context(), tempfile.TemporaryDirectory()
    with quick as patched, temporary as place, ThreadPoolExecutor(1) as pool:
        patched.setattr(os, "fsync", lambda descriptor: None)  # no power is lost here
        folder = Path(place)
        root, ids, clock = folder / "images", NAMES[:30], 10**18
        root.mkdir()
        for name in NAMES:
            (root / name).write_bytes(b"w")
            os.utime(root / name, ns=(clock, clock))
        sides = Side(folder / "one", root, False), Side(folder / "other", root, True)
        same = True  # until a plan is given up
        for made, keep, commit, retry in history:
            for change, k, content in made:
                path, clock = root / NAMES[k], clock + 10**9
                if change == "write":
                    path.write_bytes(content + str(clock).encode())
                    os.utime(path, ns=(clock, clock))
                elif change == "exchange" and path.exists():  # size and time stay
                    time = path.stat().st_mtime_ns
                    path.write_bytes(path.read_bytes()[::-1])
                    os.utime(path, ns=(time, time))
                elif change == "touch" and path.exists():
                    os.utime(path, ns=(clock, clock))
                elif change == "remove":
                    path.unlink(missing_ok=True)
                elif change == "drop":
                    ids = [id_ for id_ in ids if id_ != NAMES[k]] or ids
                elif NAMES[k] not in ids:
                    ids = [*ids, NAMES[k]]
            table = root / "t.parquet"
            pd.DataFrame({"path": ids, "label": "a", "id": ids}).to_parquet(table)
            one, other = (side.look(table, retry, keep, pool) for side in sides)
            # A plan that holds images of others, too, is given up: less is owed where there are rows of the bytes.
            assert sides[1].owed(ids) <= sides[0].owed(ids)
            sides[1].check(ids)
            equal = [shard.ids for shard in one.shards] == [shard.ids for shard in other.shards]
            if same := same and equal:
                assert vars(one) == vars(other)
            if equal:
                for side in sides:
                    side.commit({"nothing": 0, "first": 1, "all": 99}[commit], ids)
            elif commit == "all":
                for side in sides:
                    side.commit(99, ids)
        sides[0].check(ids)

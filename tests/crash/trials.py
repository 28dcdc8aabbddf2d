"""One trial each: break an extraction, run it again, and hold the outcome against one that nothing happened to."""

from __future__ import annotations

import io
import json
import marshal
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from embcache.data.dataset import ImageDataset, load_dataset
from embcache.extract.scan import TICK_NS
from embcache.store.feature_store import list_stores
from tests.crash.faults import FAULTS, Call, Hook, fault_at
from tests.crash.powerloss import ACK, Disk, Journal, write_tree
from tests.crash.runs import CASES, Case, Child, committed, contents, draw_images, fork, rubbish

KILLED = -signal.SIGKILL
TTL_SECONDS = 0.3  # of the leases of paused writers


class WrongError(AssertionError):
    """Something was lost, changed or computed twice."""


def require(fact: bool, what: str, detail: object = "") -> None:
    """Raise `WrongError` unless ``fact``."""
    if not fact:
        raise WrongError(f"{what} {detail}".strip()[:3000])


class Trials:
    """Images, the outcomes to expect, and totals.

    Attributes
    ----------
    totals : Counter
        Trials by their kind, kills, faults, power losses, bytes compared, shards that were not computed again.
    calls : dict of Case to int
        Number of calls to the filesystem of an undisturbed run.
    """

    def __init__(self, folder: Path, cases: Sequence[Case] = CASES) -> None:
        self.totals: Counter[str] = Counter()
        self.calls: dict[Case, int] = {}
        folder.mkdir(exist_ok=True)
        self._folder, self._log, self._home = folder, folder / "log", folder / "trial" / "home"
        self._expected: dict[Case, dict[str, bytes]] = {}
        self._rows: dict[Case, dict[str, int]] = {}
        self._names: dict[Case, list[str]] = {}
        self._seconds: dict[Case, float] = {}
        images = folder / "images"
        draw_images(images, grown=False)
        before = load_dataset("folder", images)
        for case in cases:
            if case.grown:
                self._run_well(before, case, self._base(case))
        draw_images(images, grown=True)
        time.sleep(1.1 * TICK_NS / 1e9)  # every run learns as much of the files, and makes as many calls
        self._dataset: ImageDataset = load_dataset("folder", images)
        for case in cases:
            self._start(case)
            self._names[case] = self._call_names(case)
            self.calls[case] = len(self._names[case])
            self._start(case)
            started = time.monotonic()
            self._run_well(self._dataset, case, self._home)
            self._seconds[case] = time.monotonic() - started
            self._expected[case] = contents(self._home)
            records = {name: data for name, data in self._expected[case].items() if name.endswith("/commit.json")}
            self._rows[case] = {name.removesuffix("/commit.json"): json.loads(d)["rows"] for name, d in records.items()}

    def places(self, case: Case, names: Sequence[str] | None) -> list[int]:
        """Those of a run's calls that have one of these names; all of them."""
        return [index for index, name in enumerate(self._names[case]) if names is None or name in names]

    def fault_at_call(self, case: Case, fault: str, index: int, *, onwards: bool = False) -> None:
        """Break the call ``index``, and with ``onwards`` all that follow, of one run; and run again."""
        self._start(case)
        first = self._committed()
        child = self._child(case, hook=fault_at(fault, index, onwards=onwards))
        done = child.wait()
        if fault.startswith("kill"):
            require(done.status == KILLED, "not killed", done)
            self.totals["kills"] += 1
        else:
            require(done.status in (0, 1), "not told as an error that says what to do", done)
            self.totals["faults"] += 1
            self.totals["faults told"] += done.status
        self._finish(case, first, [child])

    def kill_at_random(self, case: Case, chance: random.Random) -> None:
        """Kill a run at up to three random instants, and run again."""
        self._start(case)
        for _ in range(chance.randint(1, 3)):
            first = self._committed()
            child = self._child(case)
            time.sleep(chance.random() * self._seconds[case] * 1.05)
            os.kill(child.pid, signal.SIGKILL)
            done = child.wait()
            require(done.status in (0, KILLED), "failed", done)
            self.totals["random kills"] += done.status == KILLED
            self._check_lost(case, first, [child])
        self._finish(case, self._committed(), [])

    def lose_power(self, case: Case, mode: str, chance: random.Random, *, step: int, offset: int) -> None:
        """Cut the power in one run at every ``step``-th instant that leaves another disk; run again on what remains."""
        self._start(case)
        journal = Journal()
        done = self._child(case, journal=journal).wait()
        require(done.status == 0, "failed", done)
        entries = marshal.loads((self._log / "journal").read_bytes())
        self._start(case)
        disk, acknowledged, last, changes = Disk(self._home.parent, home=self._home.name), set(), "", -1
        for instant, entry in enumerate(entries):
            disk.play(entry)
            if entry[0] == ACK:
                acknowledged.add(entry[1][0])
            tree = disk.remains(mode, chance)
            state = repr((tree, acknowledged))
            changes += state != last
            new, last = state != last, state
            if not new or changes % step != offset:
                continue
            self._clear()
            write_tree(self._home.parent, tree)
            there = self._committed()
            require(acknowledged <= set(there), "a committed shard is gone", acknowledged - set(there))
            self.totals[f"power losses, {mode}"] += 1
            try:
                self._finish(case, there, [])
            except WrongError as error:
                raise WrongError(f"instant {instant} ({entry[:2]!r:.300}): {error}") from error

    def many_at_once(self, case: Case, chance: random.Random, *, workers: int = 3) -> None:
        """Several processes on one home, with or without parts, one of them killed; readers meanwhile."""
        self._start(case)
        first, parts = self._committed(), chance.random() < 0.4
        links = chance.random() < 0.7
        children, victim = [], chance.randrange(workers)
        reader_stop = self._folder / "stop"
        reader_stop.unlink(missing_ok=True)
        reader = self._reader(case, reader_stop)
        at = chance.randrange(self.calls[case])
        for worker in range(workers):
            hook = fault_at(chance.choice(["kill before", "kill after"]), at) if worker == victim else None
            part = (worker + 1, workers) if parts else None
            log = self._folder / f"log{worker}"
            children.append(Child(self._dataset, self._home, case, log, hook=_linkless(links, hook), part=part))
        ended: dict[int, int] = {}
        until = time.monotonic() + 600
        while len(ended) < workers:  # the dead must be buried: until then their leases look alive
            require(time.monotonic() < until, "the extractions hang")
            for worker, child in enumerate(children):
                if worker not in ended and (done := child.poll()) is not None:
                    ended[worker] = done.status
                    require(done.status == 0 or (worker == victim and done.status == KILLED), "failed", done)
            time.sleep(0.002)
        reader_stop.touch()
        reads = self._wait_reader(reader)
        self.totals["reads during runs"] += reads
        self.totals["kills"] += ended[victim] == KILLED
        self._check_lost(case, first, children)
        if not parts:
            require(set(self._rows[case]) == set(self._committed()), "the survivors left shards behind")
        self._finish(case, self._committed(), [])
        self.totals["runs at once"] += workers

    def pause(self, case: Case, index: int) -> None:
        """Stop a writer before a call until its lease has expired and another did its work; then let it go on."""
        self._start(case)
        paused = Child(
            self._dataset, self._home, case, self._folder / "log0", hook=fault_at("stop", index), ttl=TTL_SECONDS
        )
        _, status = os.waitpid(paused.pid, os.WUNTRACED)
        require(os.WIFSTOPPED(status), "did not stop", status)
        try:
            done = self._child(case, ttl=TTL_SECONDS).wait()
            require(done.status == 0, "the other did not finish", done)
            self._compare(case)
            before = committed(self._home)
        finally:
            os.kill(paused.pid, signal.SIGCONT)
            done = paused.wait()
        require(done.status == 0, "the one that was paused failed", done)
        require(committed(self._home) == before, "the one that was paused changed a shard")
        self._compare(case)
        require(rubbish(self._home) == [], "left behind", rubbish(self._home))
        self.totals["pauses"] += 1

    # How a trial begins and ends

    def _base(self, case: Case) -> Path:
        return self._folder / f"base-{case.format}-{len(case.backbones)}"

    def _clear(self) -> None:
        shutil.rmtree(self._home.parent, ignore_errors=True)
        self._home.parent.mkdir()

    def _start(self, case: Case) -> None:
        self._clear()
        if case.grown:
            shutil.copytree(self._base(case), self._home, symlinks=True)

    def _child(self, case: Case, **keywords: Any) -> Child:
        return Child(self._dataset, self._home, case, self._log, **keywords)

    def _run_well(self, dataset: ImageDataset, case: Case, home: Path) -> None:
        done = Child(dataset, home, case, self._log).wait()
        require(done.status == 0, "an undisturbed run failed", done)

    def _call_names(self, case: Case) -> list[str]:
        written = self._folder / "calls"
        written.unlink(missing_ok=True)
        descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def hook(call: Call, do: Callable[[], Any]) -> Any:
            os.write(descriptor, f"{call.name}\n".encode())
            return do()

        self._child(case, hook=hook).wait()
        os.close(descriptor)
        return written.read_text().split()

    def _committed(self) -> dict[str, dict[str, tuple[int, int]]]:
        return committed(self._home) if self._home.is_dir() else {}

    def _check_lost(self, case: Case, first: dict[str, Any], children: list[Child]) -> None:
        """One shard of each store at most was computed in vain."""
        new = len(set(self._committed()) - set(first))
        lost = sum(child.shards for child in children) - new
        require(0 <= lost <= len(case.backbones), "work of more than one shard was lost", (lost, new))
        self.totals["shards lost"] += lost

    def _finish(self, case: Case, first: dict[str, Any], children: list[Child]) -> None:
        """Hold what is there against what is expected; run again; hold all of it."""
        before = self._committed()
        if children:
            self._check_lost(case, first, children)
        require(all(before.get(name) == state for name, state in first.items()), "a committed shard was touched")
        if before:
            expected = self._expected[case]
            for name, data in contents(self._home).items():
                if "/shards/" in name:
                    require(
                        expected.get(name) == data, "readers see bytes that are not those of an undisturbed run", name
                    )
        done = self._child(case).wait()
        require(done.status == 0, "the run after it failed", done)
        owed = sum(rows for name, rows in self._rows[case].items() if name not in before)
        require(done.computed == owed, "not what was owed was computed", (done.computed, owed))
        after = self._committed()
        require(all(after.get(name) == state for name, state in before.items()), "a committed shard was written again")
        self._compare(case)
        require(rubbish(self._home) == [], "left behind", rubbish(self._home))
        self.totals["trials"] += 1
        self.totals["shards kept"] += len(before)
        self.totals["shards computed after"] += len(after) - len(before)

    def _compare(self, case: Case) -> None:
        found, expected = contents(self._home), self._expected[case]
        require(found.keys() == expected.keys(), "other files", sorted(found.keys() ^ expected.keys()))
        wrong = [
            name for name, data in expected.items() if found[name] != data and not _same_scan(name, found[name], data)
        ]
        require(not wrong, "other bytes", wrong)
        self.totals["files compared"] += len(found)
        self.totals["bytes compared"] += sum(map(len, found.values()))

    # Readers

    def _reader(self, case: Case, stop: Path) -> int:
        """A process that reads the stores again and again, and accepts committed rows only."""
        allowed: dict[str, dict[str, set[bytes]]] = {}
        for home in [self._whole(case), *([self._base(case)] if case.grown else [])]:
            for store in list_stores(home):
                rows = allowed.setdefault(store.path.name, {})
                for id_, row in zip(store.ids.tolist(), store.features[:], strict=True):
                    rows.setdefault(id_, set()).add(row.tobytes())
        log = self._folder / "reader"
        log.mkdir(exist_ok=True)
        (log / "end").unlink(missing_ok=True)

        def read() -> None:
            reads = 0
            while not stop.exists():
                for store in list_stores(self._home):
                    features = store.features[:]
                    require(len(features) == len(store.ids), "a reader saw half of a shard")
                    for id_, row in zip(store.ids.tolist(), features, strict=True):
                        require(row.tobytes() in allowed[store.path.name].get(id_, ()), "a reader saw other bytes", id_)
                reads += 1
                time.sleep(0.005)
            (log / "reads").write_text(str(reads))

        return fork(read, log)

    def _wait_reader(self, pid: int) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        end = self._folder / "reader" / "end"
        require(status == 0, "a reader failed", end.read_text() if end.exists() else status)
        return int((self._folder / "reader" / "reads").read_text())

    def _whole(self, case: Case) -> Path:
        """A home with the expected outcome, for readers to hold theirs against."""
        home = self._folder / f"whole-{case.format}-{len(case.backbones)}-{case.grown}"
        if not home.exists():
            if case.grown:
                shutil.copytree(self._base(case), home, symlinks=True)
            self._run_well(self._dataset, case, home)
        return home


def _linkless(links: bool, hook: Hook | None) -> Hook | None:
    """The hook, on a filesystem without hard links."""
    if links:
        return hook

    def without(call: Call, do: Callable[[], Any]) -> Any:
        def refuse() -> Any:
            raise PermissionError(1, "Operation not permitted")

        make = refuse if call.name == "link" else do
        return hook(call, make) if hook else make()

    return without


__all__ = ["FAULTS", "Trials", "WrongError"]


def _same_scan(name: str, found: bytes, expected: bytes) -> bool:
    """Whether a scan is the expected one but for digests that one of the two has not learnt: they only save work.

    So does ``networks.json``: runs at once have other options (``--part``) and see other times, and find equal recipes.
    """
    if name.endswith("/networks.json"):
        mine, whole = (json.loads(data)["networks"].values() for data in (found, expected))
        recipes = [(known["recipe"], known["notes"]) for known in whole]
        return all((known["recipe"], known["notes"]) in recipes for known in mine)
    if not name.endswith("/scan.parquet"):
        return False
    mine, whole = (pd.read_parquet(io.BytesIO(data)) for data in (found, expected))
    learnt = (mine["digest"] != "") & (whole["digest"] != "")
    return mine.drop(columns="digest").equals(whole.drop(columns="digest")) and mine["digest"][learnt].equals(
        whole["digest"][learnt]
    )

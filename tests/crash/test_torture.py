"""A short torture: some of all that `python -m tests.crash.torture` does to extractions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.powerloss import MODES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self").exists(), reason="needs fork and Linux")
def test_nothing_is_lost_changed_or_computed_twice(tmp_path: Path) -> None:
    # In a process that has started no thread: this one's other tests may have, and those do not survive a fork.
    quick = "--cases 0,5 --random 3 --together 1 --pauses 1 --every 8 --sample 3 --jobs 1".split()  # noqa: SIM905
    command = [sys.executable, "-m", "tests.crash.torture", *quick, "--json", str(tmp_path / "totals")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "totals").read_text())
    totals = result["totals"]
    assert result["failures"] == []
    assert totals["trials made"] == totals["trials planned"] >= 3 * (8 + 2) + 3
    assert totals["kills"] >= 3 * 3
    assert totals["faults"] >= totals["faults told"] >= 10
    assert totals["pauses"] == 1
    assert totals["reads during runs"] > 0
    assert all(totals.get(f"power losses, {mode}", 0) for mode in MODES)
    assert totals["shards kept"] > 30
    assert totals["bytes compared"] > 1_000_000

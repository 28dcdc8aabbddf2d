"""The machine: cores that may be used, and threads that share it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embcache.cores import usable_cores

HAVE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
QUOTA, PERIOD = "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "sys/fs/cgroup/cpu/cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/job\n", {"sys/fs/cgroup/job/cpu.max": "100000 100000\n"}, 1),
        ("0::/job/step\n", {"sys/fs/cgroup/job/cpu.max": "50000 100000\n"}, 1),  # of a group above, rounded up
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, HAVE),
        ("0::/job\n", {}, HAVE),
        # Version 1; in a container the group is the root.
        ("3:cpuset:/a\n1:cpu,cpuacct:/docker/1\n", {QUOTA: "100000", PERIOD: "100000"}, 1),
        ("1:cpu:/\n", {QUOTA: "-1", PERIOD: "100000"}, HAVE),
        ("what\n", {}, HAVE),
    ],
)  # fmt: skip
def test_the_quota_of_a_control_group_limits_the_cores(
    tmp_path: Path, cgroup: str, files: dict[str, str], cores: int
) -> None:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize("mine", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(mine: dict[str, str]) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    env = {name: value for name, value in os.environ.items() if name not in names} | mine
    script = f"import embcache, os; print([os.environ.get(name) for name in {names}])"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    expected = [mine.get(name) for name in names] if mine else ["3000", None]
    assert done.stdout.strip() == str(expected)

"""``embcache slurm``: batch scripts."""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from embcache.backbones.catalog import find_backbone
from embcache.commands.options import Skip, check_named, command
from embcache.commands.output import echo
from embcache.config import DatasetRef, ExtractConfig, SlurmConfig
from embcache.errors import UsageError
from embcache.fields import bare_name
from embcache.paths import portable_home
from embcache.places import cache_bytes, cache_dir, is_url, refuse_url

_ARRAY = """\
# Each job computes its own shards; all write into one home, on a disk that they share or in an object store.
export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
# The scheduler's SIGTERM reaches embcache, which commits its shard; submitted again, the job continues from there.
exec {command} --part "$SLURM_ARRAY_TASK_ID/{jobs}"
"""

_RAY = """\
# One Ray node per Slurm node, and a driver beside the first; the home is on a disk that they share or in an
# object store.
set -euo pipefail
export OMP_NUM_THREADS={threads} RAY_USAGE_STATS_ENABLED=0
# Who reaches the ports of a cluster can run programs on it: only processes of this job know the token.
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | sha256sum | cut -c 1-64)
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on=(srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK")
# Its own address as the others see it: on some systems the first one of a node is that of the node alone.
head=$("${{on[@]}}" --nodes=1 --ntasks=1 --nodelist="${{nodes[0]}}" \\
  bash -c 'echo $(hostname --ip-address) $(hostname -I)' | tr ' ' '\\n' |
  awk '/:/ {{next}} !/^127[.]/ {{print; found = 1; exit}} {{own = $0}} END {{if (!found) print own}}')
address="$head:$((20000 + SLURM_JOB_ID % 20000))"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
"${{on[@]}}" --nodes=1 --ntasks=1 --nodelist="${{nodes[0]}}" \\
  ray start --head --node-ip-address="$head" --port="${{address##*:}}" --num-cpus="$SLURM_CPUS_PER_TASK" \\
  --include-dashboard=false --disable-usage-stats --block &
first=$!
until (exec 3<>"/dev/tcp/$head/${{address##*:}}") 2>/dev/null; do kill -0 "$first"; sleep 1; done
others=$((${{#nodes[@]}} - 1))
if ((others)); then
  "${{on[@]}}" --nodes="$others" --ntasks="$others" --exclude="${{nodes[0]}}" \\
    ray start --address="$address" --num-cpus="$SLURM_CPUS_PER_TASK" --disable-usage-stats --block &
fi
{command} --address "$address" &
driver=$!
# The scheduler's SIGTERM is passed on to embcache, which lets the shards in work be committed.
trap 'kill -TERM "$driver" 2>/dev/null || true' TERM INT
status=0
wait "$driver" || status=$?
while kill -0 "$driver" 2>/dev/null; do status=0; wait "$driver" || status=$?; done
exit "$status"
"""


@command()
def slurm(
    *,
    backbone: list[str],
    dataset: list[str],
    home: Path | None,
    slurm: SlurmConfig,
    ref: Annotated[DatasetRef, Skip("drop_class")],
    config: Annotated[ExtractConfig, Skip("part", "address")],
) -> None:
    """Print a batch script that runs `embcache extract` with these options on a Slurm cluster.

    By default the script is a job array, each job with a part of the shards; with --engine ray it starts a Ray cluster
    in one job, with workers that share the shards. Submit it again to continue what was stopped.

    Example: embcache slurm --backbone dino --dataset nih --jobs 8 --gpus 1 > extract.sh && sbatch extract.sh
    """
    check_named("slurm", backbone=backbone, dataset=dataset)
    for name in backbone:
        if ":" not in name:  # of others, what they are made of may be on the cluster alone
            find_backbone(name)
    if len(dataset) > 1:
        raise UsageError(
            "a batch script is for one dataset", code="one-dataset", found=", ".join(dataset), fix="one script each"
        )
    echo(batch_script(backbone, dataset[0], ref, config, slurm, home), nl=False)


def batch_script(
    backbones: list[str], dataset: str, ref: DatasetRef, config: ExtractConfig, slurm: SlurmConfig, home: Path | None
) -> str:
    """The text of a batch script for ``sbatch``."""
    ray = config.engine == "ray"
    if ray:
        cores = config.cpus_per_worker or max(1, slurm.cpus // max(slurm.gpus, 1))
        gpus = 1.0 if slurm.gpus and config.gpus_per_worker is None else config.gpus_per_worker
        if cores > slurm.cpus or (gpus or 0) > slurm.gpus:
            raise UsageError(
                "no node would have room for a worker", code="slurm-room",
                found=f"{cores} cores and {gpus or 0:g} GPUs per worker",
                expected=f"at most --cpus {slurm.cpus} and --gpus {slurm.gpus}",
                fix=f"--cpus {max(cores, slurm.cpus)} --gpus {max(math.ceil(gpus or 0), slurm.gpus)}",
            )  # fmt: skip
        config = replace(config, cpus_per_worker=cores, gpus_per_worker=gpus)
    elif slurm.gpus > 1 and config.device == "auto":
        config = replace(config, device=",".join(f"cuda:{number}" for number in range(slurm.gpus)))
    if ref.data_root is not None:
        refuse_url(ref.data_root, "a folder or a table on a disk; its column of paths may have addresses of images")
        ref = replace(ref, data_root=ref.data_root.expanduser().absolute())
    config = replace(config, weights=tuple(_in_full(text, backbones) for text in config.weights))
    words = ["embcache", "extract", *(word for name in backbones for word in ("--backbone", name))]
    words += ["--dataset", dataset, *ref.words(), *config.words()]
    words += ["--home", portable_home(home)]
    if "EMBCACHE_CACHE_DIR" in os.environ:
        words += ["--cache-dir", str(cache_dir().absolute())]
    if "EMBCACHE_CACHE_SIZE" in os.environ:
        words += ["--cache-size", str(cache_bytes())]
    shape: dict[str, object] = {"nodes": slurm.jobs, "ntasks-per-node": 1} if ray else {"array": f"1-{slurm.jobs}"}
    lines = {
        "job-name": "embcache", **shape,
        "cpus-per-task": slurm.cpus, "gres": f"gpu:{slurm.gpus}" if slurm.gpus else None, "time": slurm.time,
        "mem": slurm.memory, "partition": slurm.partition, "account": slurm.account, "signal": "B:TERM@120",
    }  # fmt: skip
    asked = "".join(f"#SBATCH --{name}={value}\n" for name, value in lines.items() if value is not None)
    body = (_RAY if ray else _ARRAY).format(command=shlex.join(words), threads=config.cpus_per_worker, jobs=slurm.jobs)
    return f"#!/bin/bash\n{asked}#SBATCH --requeue\n\n{body}"


def _in_full(text: str, backbones: list[str]) -> str:
    """``[NAME=]FILE`` with the path of the file in full."""
    name, separator, file = text.partition("=")
    if not separator or name not in map(bare_name, backbones):
        name, separator, file = "", "", text
    return f"{name}{separator}{file if is_url(file) else Path(file).expanduser().absolute()}"

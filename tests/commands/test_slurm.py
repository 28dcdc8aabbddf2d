"""Batch scripts, run by programs that stand for those of Slurm and do everything on this machine."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from embcache.commands.slurm import batch_script
from embcache.config import DatasetRef, ExtractConfig, SlurmConfig
from embcache.data.dataset import load_dataset
from embcache.errors import UsageError
from embcache.extract.extract import extract
from embcache.store.feature_store import FeatureStore
from tests.extract.conftest import images
from tests.extract.test_signals import contents
from tests.refusal import refused

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the scripts are for bash")
__all__ = ["images"]

SLOW = "tests.extract.slow_net:slow"

_SBATCH = """\
#!/bin/bash
value() { sed -n "s/^#SBATCH --$1=//p" "$script"; }
script="$1"
export SLURM_CPUS_PER_TASK=$(value cpus-per-task) SLURM_JOB_NODELIST="nodes-$(value nodes)"
array=$(value array)
if [ -z "$array" ]; then exec bash "$script"; fi
export SLURM_ARRAY_TASK_COUNT=1  # as if each job had been submitted again alone
for SLURM_ARRAY_TASK_ID in $(seq "${array#1-}"); do
  export SLURM_ARRAY_TASK_ID; bash "$script" || exit
done
"""
_SRUN = """\
#!/bin/bash
for word in "$@"; do case "$word" in --*) echo "srun $word" >> "$SLURM_LOG"; shift;; *) break;; esac; done
exec "$@"
"""
_HOSTNAME = """\
#!/bin/bash
case "$1" in
  --ip-address) echo 127.0.1.1;;
  -I) echo "fe80::1 ${SLURM_TEST_ADDRESS:-127.0.0.1} 127.0.0.1";;
  *) echo node1;;
esac
"""
_SCONTROL = """\
#!/bin/bash
[ "$1 $2" = "show hostnames" ] || exit 1
for i in $(seq "${3//[^0-9]/}"); do echo "node$i"; done
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which these programs are found."""
    folder, python = tmp_path / "bin", Path(sys.executable).parent
    folder.mkdir()
    embcache = f'#!/bin/bash\nexec {sys.executable} -m embcache "$@"\n'
    programs = {"sbatch": _SBATCH, "srun": _SRUN, "scontrol": _SCONTROL, "hostname": _HOSTNAME, "embcache": embcache}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{folder}{os.pathsep}{python}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]), "SLURM_JOB_ID": str(random.randrange(20_000)),
        "SLURM_LOG": str(tmp_path / "srun.log"), "RAY_worker_niceness": "0",
    }  # fmt: skip


def submit(text: str, folder: Path, environment: dict[str, str]) -> str:
    script = folder / "extract.sh"
    script.write_text(text)
    job = subprocess.Popen(
        ["sbatch", str(script)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = job.communicate(timeout=600)
    finally:
        job.terminate()  # the script ends its nodes
    assert job.returncode == 0, said
    return said


def script(root: Path, home: Path, slurm: SlurmConfig, **options: object) -> str:
    config = ExtractConfig.make(options={"rows_per_shard": 4, "batch_size": 2, **options})
    return batch_script([SLOW], "folder", DatasetRef(data_root=root), config, slurm, home)


def store_in(home: Path) -> FeatureStore:
    (path,) = home.glob("*/tests.extract.slow_net*")
    return FeatureStore(path)


def test_an_array_computes_every_part(images: Path, home: Path, tmp_path: Path, slurm: dict[str, str]) -> None:
    said = submit(script(images, home, SlurmConfig(jobs=2, cpus=1)), tmp_path, slurm)
    assert "8 images are left for other parts" in said  # five shards, three of which are of the second part …
    assert store_in(home).committed() == (0, 1, 2, 3, 4)
    assert "error" not in said.lower()


@pytest.mark.ray
def test_a_ray_cluster_of_two_nodes_leaves_the_same_bytes(
    images: Path, home: Path, tmp_path: Path, slurm: dict[str, str]
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    config = ExtractConfig(rows_per_shard=4, batch_size=2)
    (whole,) = extract(load_dataset("folder", images), [SLOW], config, home=tmp_path / "local")
    said = submit(script(images, home, SlurmConfig(jobs=2, cpus=1), engine="ray"), tmp_path, slurm)
    assert "Ray: room for" in said
    assert contents(store_in(home).path) == contents(whole.store.path)
    asked = Path(slurm["SLURM_LOG"]).read_text().split("\n")
    assert asked.count("srun --nodelist=node1") == 2
    assert asked.count("srun --exclude=node1") == 1


def test_a_script_states_what_was_asked_for_and_quotes_it() -> None:
    config, ref = ExtractConfig(precision="bf16"), DatasetRef(data_root=Path("/data/my images"))
    asked = SlurmConfig(jobs=3, cpus=4, gpus=1, memory="32G", partition="gpu", account="lab", time="1-00")
    text = batch_script(["dino", "random"], "folder", ref, config, asked, Path("/scratch/home"))
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in ("array=1-3", "cpus-per-task=4", "gres=gpu:1", "mem=32G", "partition=gpu", "account=lab", "time=1-00"):
        assert f"#SBATCH --{line}" in lines
    (command,) = (line for line in lines if line.startswith("exec embcache extract"))
    assert "--backbone dino --backbone random --dataset folder --data-root '/data/my images'" in command
    assert "--precision bf16 --home /scratch/home --part" in command
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_workers_of_a_cluster_have_a_gpu_each_and_their_share_of_cores() -> None:
    config, asked = ExtractConfig(engine="ray"), SlurmConfig(jobs=4, cpus=8, gpus=2)
    text = batch_script(["dino"], "nih", DatasetRef(), config, asked, Path("/scratch/home"))
    assert "#SBATCH --nodes=4" in text
    assert "#SBATCH --array" not in text
    assert "--engine ray --gpus-per-worker 1.0 --cpus-per-worker 4 --home /scratch/home --address" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_script_names_the_folder_of_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMBCACHE_CACHE_DIR", str(tmp_path))  # as --cache-dir does
    monkeypatch.setenv("EMBCACHE_CACHE_SIZE", "20GB")
    for config in (ExtractConfig(), ExtractConfig(engine="ray")):
        text = batch_script(["dino"], "nih", DatasetRef(), config, SlurmConfig(), Path("/scratch/home"))
        assert f" --cache-dir {tmp_path} --cache-size 20000000000 " in text


@pytest.mark.parametrize("value", ["gpu\n#SBATCH --uid=0", "a b", "$(id)", ""])
def test_a_value_that_would_change_the_script_is_refused(value: str) -> None:
    with refused(UsageError, "slurm-value"):
        SlurmConfig(partition=value)


def test_what_no_node_has_room_for_is_refused() -> None:
    for asked, options in (
        (SlurmConfig(cpus=4), {"cpus_per_worker": 16}),
        (SlurmConfig(cpus=4, gpus=1), {"gpus_per_worker": 4.0}),
    ):
        config = ExtractConfig.make(options={"engine": "ray", **options})
        with refused(UsageError, "slurm-room"):
            batch_script(["dino"], "nih", DatasetRef(), config, asked, Path("/scratch/home"))


def test_every_gpu_of_a_job_is_used() -> None:
    asked, home = SlurmConfig(gpus=2), Path("/scratch/home")
    text = batch_script(["dino"], "nih", DatasetRef(), ExtractConfig(), asked, home)
    assert " --device cuda:0,cuda:1 " in text
    text = batch_script(["dino"], "nih", DatasetRef(), ExtractConfig(device="cuda:1"), asked, home)
    assert " --device cuda:1 " in text


def test_files_are_named_from_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, given, full in (
        ("own", "own=w.pth", f"own={tmp_path}/w.pth"),
        ("own", "own=s3://lab/w.pth", "own=s3://lab/w.pth"),
        ("own", "s3://lab/w.pth", "s3://lab/w.pth"),
        ("onnx:net=1.onnx", "w.pth", f"{tmp_path}/w.pth"),
    ):
        config, ref = ExtractConfig(weights=(given,)), DatasetRef(data_root=Path("images"))
        text = batch_script([name], "folder", ref, config, SlurmConfig(), tmp_path)
        assert f" --data-root {tmp_path}/images --weights {full} " in text
    with refused(UsageError, "place-address"):
        ref = DatasetRef(data_root=Path("s3://lab/t.csv"))
        batch_script(["own"], "folder", ref, ExtractConfig(), SlurmConfig(), tmp_path)


def test_time_and_memory_are_as_sbatch_reads_them() -> None:
    for time in ("UNLIMITED", "90", "90:00", "04:00:00", "1-12", "1-12:30", "1-12:30:00"):
        SlurmConfig(time=time, memory="64g")
    for wrong in ({"time": "4h"}, {"time": "1d"}, {"time": "1:2:3:4"}, {"memory": "64GB"}, {"memory": "1.5G"}):
        with refused(UsageError, "slurm-value"):
            SlurmConfig.make(options=wrong)


@pytest.mark.parametrize(("own", "found"), [("10.1.2.3", "10.1.2.3"), ("127.0.0.1", "127.0.0.1")])
def test_a_cluster_is_reached_by_an_address_that_other_nodes_see(
    own: str, found: str, images: Path, home: Path, slurm: dict[str, str]
) -> None:
    text = script(images, home, SlurmConfig(jobs=2, cpus=1), engine="ray")
    begins, ends = text.index("nodes=(" if "nodes=(" in text else "mapfile"), text.index("address=")
    asked = f'{text[begins:ends]}\necho "$head"'
    environment = {**slurm, "SLURM_TEST_ADDRESS": own, "SLURM_JOB_NODELIST": "nodes-2", "SLURM_CPUS_PER_TASK": "1"}
    done = subprocess.run(["bash", "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found]


def test_workers_without_gpus_may_be_asked_for_on_nodes_that_have_some(images: Path, home: Path) -> None:
    asked = SlurmConfig(jobs=2, cpus=4, gpus=1)
    assert "--gpus-per-worker 1.0" in script(images, home, asked, engine="ray")
    assert "--gpus-per-worker 0" in script(images, home, asked, engine="ray", gpus_per_worker=0.0)

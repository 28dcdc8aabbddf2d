"""Configs: one frozen dataclass per journey, from which options, Python keywords, worker JSON and run IDs derive.

A new option is one field. Importing this module imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from embcache.errors import UsageError
from embcache.fields import (
    Config,
    option,
    parse_count_or_share,
    parse_numbers,
    parse_pairs,
    parse_part,
    parse_whole,
    split_list,
)

MOST_FOLDS = MOST_REPEATS = MOST_VIEWS = 1_000
MOST_SEED = 2**62  # one is added for each repeat, and torch takes 63 bits
LEAST_RATE = 1e-30
RECIPE = "First digits of the store's fingerprint, where several recipes are cached; of several backbones with commas."


def _recipe() -> Any:
    return option(None, RECIPE, metavar="PREFIX", result="recipes")


def _weights(which: str = "of a backbone") -> Any:
    return option(
        (),
        f"Checkpoint {which}, a file or s3://…; NAME= can be omitted for a single backbone.",
        metavar="[NAME=]FILE",
        result="recipes",
    )


def _transform(help: str) -> Any:
    names = ("paper", "imagenet", "model")
    return option(None, help, metavar="|".join(names), choices=names, result="recipes")


def _decode() -> Any:
    text = "full, or reduced: large JPEGs at 1/2, 1/4 or 1/8 of their size, faster; part of the recipe."
    return option("full", text, choices=("full", "reduced"), result="recipes")


def _device() -> Any:
    return option("auto", "auto, cpu, cuda:0, …", metavar="NAME")


def _workers() -> Any:
    return option(None, "Threads that decode images. [default: one per core, at most 8]", least=1, most=1 << 10)


def _max_pixels() -> Any:
    text = "Largest image that is decoded, in pixels. [default: $EMBCACHE_MAX_PIXELS or 89478485]"
    return option(None, text, least=1, result="images")


@dataclass(frozen=True)
class DatasetRef(Config):
    """Where a dataset is, and how its table is read.

    The name of the dataset itself is an argument of its own: several can be read alike.
    """

    heading: ClassVar[str] = "Dataset options"

    data_root: Path | None = option(
        None, "Folder of the dataset, or its table. [default: $EMBCACHE_DATA/NAME or ./data/NAME]", metavar="FOLDER"
    )
    name: str | None = option(
        None, "Name of a `folder` dataset. [default: its folder's name and a hash]", metavar="NAME"
    )
    path_column: str = option("", "Column of a table with the paths of the images.", metavar="NAME")
    label_column: str = option("", "Column of a table with the labels.", metavar="NAME")
    group_column: str = option(
        "", "Column of a table with patients, slides …; no split divides a group. [default: group, or a usual name]",
        metavar="NAME",
    )  # fmt: skip
    split_column: str = option("", "Column of a table with train, val or test.", metavar="NAME")
    id_column: str = option("", "Column of a table with the IDs of the images.", metavar="NAME")
    allow_missing: bool = option(False, "Skip images that are listed but missing.")
    drop_class: tuple[str, ...] = option(
        (), "Leave out the images of a class, or a finding; repeatable or comma-separated.", metavar="NAME[,NAME…]"
    )
    merge_class: tuple[str, ...] = option((), "Merge classes under a new name; repeatable.", metavar="A+B=NEW")
    target: str | None = option(
        None, "Column of the dataset's table to predict instead of its labels; several are findings.",
        metavar="COLUMN[,COLUMN…]",
    )  # fmt: skip
    task: str | None = option(
        None, "What is predicted: one class, an ordered one, several findings, a number. [default: by the values, with "
        "a note]", choices=("classes", "ordinal", "findings", "number"),
    )  # fmt: skip
    uncertain: str = option(
        "unknown", "What uncertain values of findings (-1) are taken as.", choices=("unknown", "zero", "one")
    )
    unmentioned: str = option("unknown", "What empty values of findings are taken as.", choices=("unknown", "zero"))


@dataclass(frozen=True)
class EngineConfig(Config):
    """Who does the work: this machine, or a Ray cluster, which is only used if it is asked for."""

    heading: ClassVar[str] = "Cluster options"

    engine: str = option("local", "This machine, or Ray (extra `ray`).", choices=("local", "ray"))
    address: str | None = option(
        None, "Address of a Ray cluster. [default: Ray on this machine, until the command ends]", metavar="HOST:PORT"
    )
    num_workers: int | None = option(None, "Workers of Ray. [default: as many as have room]", least=1, most=1 << 16)
    gpus_per_worker: float | None = option(
        None, "GPUs per worker, or a part of one. [default: 0]", metavar="X", least=0.0
    )
    cpus_per_worker: int | None = option(
        None, "Cores per worker, and threads of torch. [default: threads of the store]", least=1, most=1 << 12
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("address", "num_workers", "gpus_per_worker", "cpus_per_worker")
            if vars(self)[name] is not None
        ]
        if given and self.engine != "ray":
            raise UsageError(
                "options of Ray without Ray", code="option-without-ray", found=", ".join(given),
                expected=f"--engine ray with {given[0]}", fix="--engine ray",
            )  # fmt: skip


@dataclass(frozen=True)
class ExtractConfig(EngineConfig):
    """How features are extracted."""

    heading: ClassVar[str] = "Extraction options"

    weights: tuple[str, ...] = _weights()
    transform: str | None = _transform(
        "paper: 256×256, center crop 224, images up to 224 as they are. imagenet: shorter side 256, center crop 224. "
        "model: that of a timm:, hf:, open_clip: or onnx: backbone. [default: model for these, else paper]"
    )
    decode: str = _decode()
    tokens: str | None = option(
        None, "Tokens of a vision transformer that become features. [default: as its publisher pools them]",
        choices=("cls", "mean", "cls+mean", "pooler", "projected", "patches"), flag="--tokens,--pooling",
    )  # fmt: skip
    layers: str | None = option(
        None, "Blocks of a vision transformer; their tokens are concatenated. [default: the last]",
        metavar="lastN|I,J,…",
    )  # fmt: skip
    device: str = option(
        "auto", "auto, cpu, cuda:0, …; several share the work in one process each.", metavar="NAME[,NAME…]"
    )
    runtime: str = option(
        "auto", "What executes a network: torch (eager), torch.compile, OpenVINO or ONNX Runtime. auto takes OpenVINO "
        "on a CPU where it is installed and there are enough images. A store keeps its own.", metavar="NAME",
        choices=("auto", "eager", "compile", "openvino", "onnxruntime"),
    )  # fmt: skip
    precision: str = option(
        "fp32", "Precision of the network; part of the recipe.", choices=("fp32", "tf32", "bf16", "fp16")
    )
    batch_size: int | None = option(
        None, "Images per batch. [default: that of the store; for a new store 16 on a CPU, 64 on a GPU]", least=1,
        most=1 << 16,
    )  # fmt: skip
    workers: int | None = _workers()
    rows_per_shard: int | None = option(
        None, "Images that are computed and committed together in a new store; Ctrl-C waits for them. [default: 64 "
        "on a CPU, 4096 on a GPU; more above 131,072 and 8,388,608 images; 4096 in an object store]", least=1,
        most=1 << 20,
    )  # fmt: skip
    format: str | None = option(None, "File format of a new store. [default: zarr]", choices=("zarr", "hdf5"))
    part: tuple[int, int] | None = option(
        None, "Compute only the I-th of N parts, for array jobs.", metavar="I/N", parse=parse_part
    )
    views: int = option(
        1, "Views per image: the plain one and V - 1 augmented ones, in a store of its own.", metavar="V", least=1,
        most=MOST_VIEWS,
    )  # fmt: skip
    feature_dtype: str = option(
        "float32", "Data type of the stored features; part of the recipe.", choices=("float32", "float16")
    )
    on_error: str = option(
        "quarantine", "Skip an image that cannot be used and record the reason, or stop at the first one.",
        choices=("quarantine", "fail"),
    )  # fmt: skip
    max_bad: int | str = option(
        "1%", "Maximum number or percentage of unreadable images.", metavar="N|P%", parse=parse_count_or_share
    )
    retry_quarantined: bool = option(False, "Try quarantined images again, even if they have not changed.")
    max_pixels: int | None = _max_pixels()
    stage: str | None = option(
        None, "Decode all images first and keep their pixels, so that networks read these.", choices=("pixels",)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            parse_part(f"{self.part[0]}/{self.part[1]}")


@dataclass(frozen=True)
class SlurmConfig(Config):
    """What a batch script asks of Slurm."""

    heading: ClassVar[str] = "Slurm options"

    jobs: int = option(8, "Jobs of the array; with --engine ray, nodes of the cluster.", least=1, most=1 << 12)
    cpus: int = option(8, "Cores per job or node.", least=1, most=1 << 12)
    gpus: int = option(0, "GPUs per job or node.", least=0, most=64)
    time: str = option(
        "04:00:00", "Time limit; a job that is stopped continues when it is submitted again.", metavar="TIME"
    )
    memory: str | None = option(None, "Memory per job or node. [default: that of the cluster]", metavar="SIZE")
    partition: str | None = option(None, "Partition. [default: that of the cluster]", metavar="NAME")
    account: str | None = option(None, "Account. [default: your own]", metavar="NAME")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            pattern, expected = _SLURM_TEXTS.get(name, (r"[\w.:,@+-]+", "letters, digits and . : , @ + -"))
            if isinstance(value, str) and not re.fullmatch(pattern, value):
                raise UsageError(
                    f"--{name} cannot stand in a batch script", code="slurm-value", found=repr(value)[:80],
                    expected=expected, where=f"--{name}",
                )  # fmt: skip


# As `man sbatch` has them.
_SLURM_TEXTS = {
    "time": (r"UNLIMITED|([0-9]+-)?[0-9]+(:[0-9]+){0,2}", "minutes, M:S, H:M:S, or days: D-H, D-H:M, D-H:M:S"),
    "memory": (r"[0-9]+[KMGTkmgt]?", "a whole number, in megabytes or with K, M, G or T"),
}


@dataclass(frozen=True)
class ImportConfig(Config):
    """How features that were made elsewhere are read."""

    heading: ClassVar[str] = "Import options"

    ids: Path | None = option(
        None, "Names of the images, for arrays without: a text file with one per line, or a table.", metavar="FILE"
    )
    mean: bool = option(False, "Average several vectors of an image, such as those of a slide's patches.")
    format: str | None = option(None, "File format of a new store. [default: zarr]", choices=("zarr", "hdf5"))
    max_bad: int | str = option(
        "1%", "Maximum number or percentage of images without features.", metavar="N|P%", parse=parse_count_or_share
    )


@dataclass(frozen=True)
class VerifyConfig(Config):
    """What is verified in addition to the bytes of stores, and how rows are computed again."""

    heading: ClassVar[str] = "Verification options"

    repair: bool = option(False, "Compute damaged shards again from the images; the others stay.")
    source: bool = option(False, "Hash the images again, and list those that changed since extraction.")
    sample: int = option(0, "Compute N random rows again and compare them.", least=0, most=10**9)
    weights: tuple[str, ...] = _weights()
    device: str = _device()
    max_pixels: int | None = _max_pixels()


@dataclass(frozen=True)
class ExportConfig(Config):
    """How a store is exported."""

    heading: ClassVar[str] = "Export options"

    recipe: str | None = _recipe()
    format: str | None = option(
        None, "Format of the file. [default: by the suffix of TARGET]",
        choices=("npz", "parquet", "csv", "zarr", "hdf5"),
    )  # fmt: skip
    views: int | None = option(
        None, "Export the store with V views per image. [default: the plain one]", metavar="V", least=1, most=MOST_VIEWS
    )
    force: bool = option(False, "Replace TARGET if it exists.")


@dataclass(frozen=True)
class ProtocolConfig(Config):
    """The protocol that probing and finetuning share: folds, subsets, validation, test set, metric."""

    heading: ClassVar[str] = "Protocol options"

    folds: int = option(
        5, "Number of folds of the cross-validation.", metavar="K", result=True, least=2, most=MOST_FOLDS
    )
    seed: int = option(
        0, "Seed of folds, subsets, initial weights, order and dropout.", result=True, least=0, most=MOST_SEED
    )
    val: str = option(
        "full", "Validate on the whole fold, or on as many images as are trained on, balanced.", result=True,
        choices=("full", "matched"),
    )  # fmt: skip
    test: str = option(
        "local", "Where the labels of the official test set are not public: hold out 20 % of the labeled images, or "
        "nothing.", result=True, choices=("local", "official"),
    )  # fmt: skip
    exclude_test_overlap: bool = option(
        False, "Leave out training images that share a group with the official test set.", result=True
    )
    splits: str | None = option(
        None, "Use the splits of a file, or of a registered name, instead of drawing them.", result="splits",
        metavar="FILE|NAME",
    )  # fmt: skip
    metric: str | None = option(
        None, "Metric that scores models and chooses epochs. [default: that of the dataset]", result="metric",
        metavar="NAME",
    )  # fmt: skip
    loss: str | None = option(
        None, "Loss of trained heads: softmax, cumulative (ordinal), bce or weighted-bce (findings), squared or huber "
        "(number). [default: softmax; with --task ordinal cumulative; bce; squared]", result=True, metavar="NAME",
    )  # fmt: skip
    positive: str | None = option(
        None, "Positive class of two. [default: the one not named normal, benign, negative, no …, 0 and the like; "
        "else the second]", metavar="CLASS", result="positive",
    )  # fmt: skip


@dataclass(frozen=True)
class ProbeConfig(ProtocolConfig):
    """How heads are trained on cached features."""

    heading: ClassVar[str] = "Probe options"

    head: str = option(
        "linear", "Heads to train, comma-separated; see `embcache heads`.", metavar="NAME[,NAME…]", result="head"
    )
    head_options: Mapping[str, Any] = option(
        {}, "Hyperparameter of the head; repeatable.", metavar="NAME=VALUE", flag="--head-option", result="head",
        parse=parse_pairs,
    )  # fmt: skip
    attention: str | None = option(
        None, "Attention of dvme by all scores (exact), by a few nodes with the same result to 1e-5 (fast), or by "
        "the faster of the two. [default: auto]", choices=("auto", "exact", "fast"), result="head",
    )  # fmt: skip
    lr: tuple[float, ...] = option(
        (), "Learning rate; of several, each fold keeps the best on validation. [default: 1e-3]",
        metavar="RATE[,RATE…]", result=True, least=LEAST_RATE, parse=parse_numbers,
    )  # fmt: skip
    repeats: int = option(
        1, "Repeat everything R times with seeds N, N + 1, …", metavar="R", result=True, least=1, most=MOST_REPEATS
    )
    views: int = option(
        1, "Train on V cached views per image, drawn anew in each epoch.", metavar="V", result=True, least=1,
        most=MOST_VIEWS,
    )  # fmt: skip
    recipe: str | None = _recipe()
    buffer: int | None = option(
        None, "Stream features from their shards through a shuffle buffer of N rows, and read the next N meanwhile. "
        "[default: all in memory]",
        result=True, least=64, most=10**9,
    )  # fmt: skip
    device: str = option("cpu", "Device on which heads are trained: cpu, cuda, cuda:0, …", metavar="NAME")
    again: bool = option(False, "Train even if a saved result answers the same question.")
    save: bool = option(True, "Write the run folder, and reuse those that are there.", flag="-")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention is not None and "dvme" not in split_list(self.head):
            raise UsageError(
                "--attention is for the head dvme", code="option-of-another-head", found=f"--head {self.head}",
                fix="--head dvme, or leave --attention out",
            )  # fmt: skip
        if self.attention is not None and "attention" in self.head_options:
            raise UsageError(
                "attention is given twice", code="repeated-option", expected="each name once",
                found="--attention and --head-option attention=…", fix="leave --head-option attention=… out",
            )  # fmt: skip

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those of the head that are set."""
        own = {} if self.attention is None else {"attention": self.attention}
        return {**self.head_options, **own}


@dataclass(frozen=True)
class FinetuneConfig(ProtocolConfig):
    """How backbones and a head are trained together on images."""

    heading: ClassVar[str] = "Finetuning options"

    head: str = option(
        "linear", "Head to train: linear, mlp, or one that fuses backbones: dvme, …", result="head",
        metavar="NAME[,NAME…]",
    )  # fmt: skip
    weights: tuple[str, ...] = _weights()
    transform: str | None = _transform(
        "Preprocessing as in extract; the crop is random in training. [default: model for timm:, hf:, …, else paper]"
    )
    decode: str = _decode()
    device: str = _device()
    precision: str = option(
        "fp32", "fp32 or bf16; with CUDA also tf32 and fp16.", metavar="KIND", result="recipes",
        choices=("fp32", "tf32", "bf16", "fp16"),
    )  # fmt: skip
    lr: float | None = option(
        None, "Learning rate. [default: 1e-3; with dino 1e-4]", metavar="RATE", least=LEAST_RATE, result="schedule"
    )
    batch_size: int | None = option(
        None, "Images per step. [default: 64; with dino 16]", least=1, most=1 << 16, result="schedule"
    )
    accumulate: int = option(
        1, "Number of parts in which a batch is computed, to save memory.", result=True, least=1, most=1 << 16
    )
    max_epochs: int = option(50, "Maximum number of epochs.", result="schedule", least=1, most=100_000)
    workers: int | None = option(
        None, "Threads that prepare images. [default: one per core, at most 8]", least=0, most=1 << 10
    )
    max_pixels: int | None = _max_pixels()
    pixel_cache: bool = option(
        True, "Keep decoded, resized images for later epochs and runs.", flag="--pixel-cache/--no-pixel-cache"
    )
    models: bool = option(True, "Keep the model of each fold, for `embcache predict`.", flag="--models/--no-models")
    resume: bool | None = option(False, "Continue an interrupted run of the same request.")  # None: if there is one
    again: bool = option(False, "Train from the beginning even if a saved result answers the same question.")


@dataclass(frozen=True)
class PredictConfig(Config):
    """How a saved run predicts images."""

    heading: ClassVar[str] = "Prediction options"

    weights: tuple[str, ...] = _weights("that the run was made with")
    device: str = _device()
    folds: tuple[int, ...] = option(
        (), "Average the models of these folds. [default: all]", metavar="K[,K…]", parse=parse_whole
    )
    prevalence: str | None = option(
        None, "Prevalence of the positive class of two, or of each class, where the model is to be used: "
        "probabilities are corrected to it.", metavar="P|CLASS=P,…",
    )  # fmt: skip
    calibrate: bool = option(
        False, "Fit a temperature for each model on its own validation images. Without --prevalence, classes are as "
        "frequent as among these.",
    )  # fmt: skip
    by_group: Path | None = option(
        None, "Also write a CSV with one row per group (patient): the mean probabilities of its images.", metavar="FILE"
    )
    trust: tuple[str, ...] = option(
        (), "Import a backbone or head of the run that is not part of embcache; repeatable.", metavar="MODULE:NAME"
    )
    workers: int | None = _workers()
    max_pixels: int | None = _max_pixels()


@dataclass(frozen=True)
class MapConfig(Config):
    """How embeddings are mapped to the plane."""

    heading: ClassVar[str] = "Map options"

    run: tuple[str, ...] = option(
        (), "Run of a head that fuses, such as dvme: ID or a unique prefix. See `embcache results`.",
        metavar="ID[,ID…]", parse=split_list,
    )  # fmt: skip
    method: str = option("tsne", "Method; umap needs the extra `umap`.", choices=("tsne", "umap", "pca"))
    rows: str = option("test", "Labeled images to map.", choices=("test", "train", "all"))
    limit: int | None = option(None, "Draw at most N of the images. [default: all]", least=4)
    positive: str | None = option(
        None, "Color by this finding. [default: the most frequent findings, each with a color]", metavar="NAME"
    )
    perplexity: float = option(30.0, "Perplexity of t-SNE.", metavar="P", least=1, most=1000)
    seed: int = option(0, "Seed of the maps.", least=0, most=2**32 - 1)
    recipe: str | None = _recipe()


@dataclass(frozen=True)
class AttentionConfig(Config):
    """Which attention is shown."""

    heading: ClassVar[str] = "Attention options"

    weights: Path | None = option(None, "With --image: checkpoint of the backbone.", metavar="FILE")
    transform: str | None = _transform("With --image: the same as in extract.")
    recipe: str | None = _recipe()


@dataclass(frozen=True)
class NeighborsConfig(Config):
    """Which neighbors of an image are shown."""

    heading: ClassVar[str] = "Neighbor options"

    k: int = option(8, "Number of neighbors.", metavar="K", flag="-k", least=1, most=1_000)
    recipe: str | None = _recipe()


@dataclass(frozen=True)
class AuditConfig(Config):
    """What an audit of a dataset looks for."""

    heading: ClassVar[str] = "Audit options"

    similarity: float = option(
        0.95, "Cosine from which two images count as near-duplicates.", metavar="S", least=1e-9, most=1
    )
    most: int = option(
        100, "Maximum number of likely label errors to list, per side (training, test).", least=0, most=1_000_000
    )
    folds: int = option(5, "Number of folds.", metavar="K", flag="-", least=3, most=MOST_FOLDS)
    seed: int = option(0, "Seed of the folds.", least=0, most=MOST_SEED)
    recipe: str | None = _recipe()


@dataclass(frozen=True)
class StudyConfig(ProtocolConfig, EngineConfig):
    """What a study holds and how its results are made: options of ``embcache run``, and keys of a study's TOML file.

    Lists that are empty are those of the table itself. A list among the backbones is one set, for heads that fuse.
    """

    heading: ClassVar[str] = "Study options"

    title: str = option("", "Title of the table.", flag="-")
    datasets: tuple[str, ...] = option(
        (), "Datasets instead of those of the table; repeatable or comma-separated. See `embcache datasets`.",
        metavar="NAME[,NAME…]", flag="--dataset", parse=split_list,
    )  # fmt: skip
    backbones: tuple[tuple[str, ...], ...] = option(
        (), "Backbones instead of those of the table; repeatable or comma-separated. See `embcache backbones`.",
        metavar="NAME[,NAME…]", flag="--backbone", parse=split_list,
    )  # fmt: skip
    subsets: tuple[str | int, ...] = option(
        (), "Subsets instead of those of the table; repeatable or comma-separated.", metavar="S,M,F,N",
        flag="--subset", parse=split_list,
    )  # fmt: skip
    heads: tuple[str, ...] = option(
        (), "Heads instead of those of the table; repeatable or comma-separated.", metavar="NAME[,NAME…]",
        flag="--head", parse=split_list,
    )  # fmt: skip
    seeds: tuple[int, ...] = option((), "Seeds of the table; one model for each.", flag="-", least=0, most=MOST_SEED)
    kind: tuple[str, ...] = option((), "probe, finetune, or both.", flag="-", choices=("probe", "finetune"))
    repeats: int = option(
        1, "Repeat everything R times with seeds N, N + 1, …; probes only.", metavar="R", least=1, most=MOST_REPEATS
    )
    lr: tuple[float, ...] = option(
        (), "Learning rate; of several, each fold of a probe keeps the best on validation. [default: 1e-3]",
        metavar="RATE[,RATE…]", least=LEAST_RATE, parse=parse_numbers,
    )  # fmt: skip
    max_epochs: int = option(50, "Maximum number of epochs of finetuning.", least=1, most=100_000)
    recipe: str | None = _recipe()
    weights: tuple[str, ...] = option((), "Checkpoint of a backbone; repeatable.", metavar="NAME=FILE")
    transform: str | None = _transform(
        "The same as in extract. [default: model for timm:, hf:, open_clip:, onnx:, else paper]"
    )
    device: str = option("auto", "auto, cpu, cuda:0, …; with auto, heads are trained on the CPU.", metavar="NAME")
    workers: int | None = _workers()

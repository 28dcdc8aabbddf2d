"""Ray: one actor per device, on the nodes of a cluster; imported only where Ray is named as the engine.

Actors are not restarted and their calls are not repeated by Ray: the driver asks the store what a lost actor has
committed. An actor has no arguments of its own, which Ray would need to restart it.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

from embcache.config import EngineConfig
from embcache.cores import usable_cores
from embcache.errors import EmbcacheError, UsageError
from embcache.extract.engines.dispatch import Dispatch, Lost, Ready, WorkerPool
from embcache.extract.engines.engine import Engine, OwedShard, OwedShards, ShardJob, ShardOutcome
from embcache.extract.engines.local import Stop, exit_status, lengthen, progress_bar
from embcache.log import log, shown

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_worker_niceness", "0")  # else workers yield to all other work on their machine
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # an actor without GPUs sees none, without a warning
try:
    import ray
    import ray._private.worker
    from ray.exceptions import (
        NodeDiedError,
        ObjectLostError,
        OutOfMemoryError,
        RayActorError,
        RayError,
        RayTaskError,
        WorkerCrashedError,
    )
except ImportError as error:
    raise UsageError(
        "Ray is not installed", code="no-ray", fix="pip install 'embcache[ray]', or --engine local"
    ) from error

# An answer of more than 100 kB, that of 4,096 rows, stays with its node until it is asked for.
_LOST = (WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError)
_OBJECT_STORE = 100 << 20  # bytes; no features travel through it
_PATIENCE_SECONDS = 20.0

S = TypeVar("S")
T = TypeVar("T")


def _found(error: Exception) -> str:
    return "no port" if isinstance(error, ValueError) else (str(error) or type(error).__name__)[:300]


@contextmanager
def connected(config: EngineConfig) -> Iterator[None]:
    """A connection to the cluster of ``config``, or Ray on this machine alone, until the block ends."""
    if ray.is_initialized():
        yield
        return
    if config.address is None:
        if (config.cpus_per_worker or 0) > usable_cores():
            raise _no_room(f"{usable_cores()} cores", config.cpus_per_worker or 0, config.gpus_per_worker or 0)
        cores = (config.num_workers or 1) * (config.cpus_per_worker or usable_cores())
        own: dict[str, Any] = {
            "num_cpus": max(usable_cores(), cores),
            "object_store_memory": _OBJECT_STORE,
            "include_dashboard": False,
        }
    else:
        own = {}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    # Of a lost node Ray would print twenty lines of its raylet's state to stdout, which may be a command's answer.
    ray._private.worker._worker_logs_enabled = False
    log.info("starting Ray on this machine" if config.address is None else f"connecting to Ray at {config.address}")
    with _handlers_kept():
        try:
            if config.address is not None:  # Ray itself would try for minutes
                host, _, port = config.address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE_SECONDS).close()
            ray.init(address=config.address or "local", **own, **quiet)
        except (OSError, RuntimeError, ValueError, OverflowError, RayError) as error:
            raise EmbcacheError(
                "no Ray cluster answers", code="ray-address", found=_found(error),
                where=config.address or "this machine", expected="HOST:PORT, as `ray start --head` prints it",
                fix=(
                    "leave --address out to start Ray on this machine",
                    "for a cluster with token authentication: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=…",
                ),
            ) from error  # fmt: skip
    try:
        yield
    finally:
        with _handlers_kept():
            ray.shutdown()


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray puts a handler of its own in the place of that of SIGTERM."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main and before is not None:
            signal.signal(signal.SIGTERM, before)


# How an object store is reached. Credentials, and the profiles that hold them, are those of each node.
_REACHED_BY = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ALLOW_HTTP", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_TIMEOUT",
    "AWS_SKIP_SIGNATURE", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "AWS_REQUEST_PAYER", "AZURE_STORAGE_ACCOUNT_NAME",
)  # fmt: skip


class Surroundings:
    """Working folder and variables of the driver, for processes that the cluster started elsewhere."""

    def __init__(self) -> None:
        self._folder = os.getcwd()  # noqa: PTH109  # as text
        self._variables = {
            name: text for name, text in os.environ.items() if name.startswith("EMBCACHE_") or name in _REACHED_BY
        }

    def enter(self, threads: int) -> None:
        """Work in the same folder, if it is there, with a number of torch's threads; variables of the node win."""
        with suppress(OSError):
            os.chdir(self._folder)
        for name, text in self._variables.items():
            os.environ.setdefault(name, text)
        import torch

        torch.set_num_threads(threads)


class _Hand:
    """An actor: a worker and its process."""

    def __init__(self) -> None:
        self._open = ExitStack()

    def open(self, job: ShardJob, threads: int, surroundings: Surroundings) -> tuple[Ready | EmbcacheError, list[str]]:
        surroundings.enter(threads)
        where = f"the worker on {socket.gethostname()} (process {os.getpid()})"

        def begin() -> Ready:
            self._worker = self._open.enter_context(job.open())
            return Ready(where)

        return _attempt(begin)

    def run(self, shard: OwedShard) -> tuple[ShardOutcome | EmbcacheError, list[str]]:
        return _attempt(lambda: self._worker.run(shard))

    def notes(self) -> list[str]:
        return self._worker.decoding.notes()


def _attempt(work: Callable[[], T]) -> tuple[T | EmbcacheError, list[str]]:
    """What some work gives, or its error, and the warnings that were logged meanwhile."""
    notes = list[str]()
    with shown(notes.append, logging.WARNING):
        try:
            return work(), notes
        except EmbcacheError as error:
            return error, notes


class RayPool(WorkerPool):
    """Actors that open one job."""

    def __init__(self, job: ShardJob, threads: int, gpus: float) -> None:
        self._job, self._threads, self._gpus = job, threads, gpus
        self._surroundings = Surroundings()
        # `max_restarts`: a restarted actor would have to load its networks anew, on a node that may be bad.
        self._class = ray.remote(_Hand).options(
            num_cpus=threads, num_gpus=gpus, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}
        self._started = 0

    def room(self) -> int:
        """Actors that the nodes have resources for, in use or not."""
        return _room(self._threads, self._gpus)

    def start(self) -> int:
        """Another actor; Ray places it."""
        self._started += 1
        self._actors[self._started] = self._class.remote()
        opened = self._actors[self._started].open.remote(self._job, self._threads, self._surroundings)
        self._pending[opened] = self._started
        return self._started

    def give(self, worker: int, shard: OwedShard) -> None:
        """Let an actor compute a shard."""
        self._pending[self._actors[worker].run.remote(shard)] = worker

    def wait(self, seconds: float) -> Sequence[tuple[int, Ready | ShardOutcome | Lost | EmbcacheError]]:
        """Answers of actors, and losses."""
        if not self._pending:  # what is left is with other processes
            time.sleep(seconds)
            return []
        done, _ = ray.wait(list(self._pending), timeout=seconds)
        answers = list[tuple[int, Ready | ShardOutcome | Lost | EmbcacheError]]()
        for each in done:
            worker = self._pending.pop(each)
            try:
                answer, notes = ray.get(each)
            except (RayActorError, *_LOST) as error:
                answers.append((worker, Lost(reason := _reason(error), "node" in reason)))
                continue
            except RayTaskError as error:  # no error that a user can fix: as without Ray
                raise error.cause from error
            _warn(notes)
            answers.append((worker, answer))
        return answers

    def end(self, worker: int) -> None:
        """Kill an actor."""
        actor = self._actors.pop(worker)
        self._pending = {each: owner for each, owner in self._pending.items() if owner != worker}
        with suppress(RayError):
            ray.kill(actor, no_restart=True)

    def close(self) -> None:
        """Ask idle actors for their notes, and end all."""
        busy = set(self._pending.values())
        asked = [actor.notes.remote() for worker, actor in self._actors.items() if worker not in busy]
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=5) if asked else ([], [])
        for each in done:
            with suppress(RayError):
                _warn(ray.get(each))
        for worker in list(self._actors):
            self.end(worker)


def _nodes() -> list[dict[str, float]]:
    """The resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _room(threads: int, gpus: float) -> int:
    """Workers with so many cores and GPUs that the nodes have resources for, in use or not."""
    return sum(
        int(min(node.get("CPU", 0) / threads, node.get("GPU", 0) / gpus if gpus else 1 << 16)) for node in _nodes()
    )


def check_room(threads: int, gpus: float) -> int:
    """The room, where there is any: Ray itself would wait for it without a word."""
    if room := _room(threads, gpus):
        return room
    there = "; ".join(f"{each.get('CPU', 0):g} cores, {each.get('GPU', 0):g} GPUs" for each in _nodes())
    raise _no_room(there or "no node", threads, gpus, "--gpus-per-worker 0" if _room(threads, 0) else "")


def _no_room(there: str, threads: int, gpus: float, fix: str = "") -> EmbcacheError:
    return EmbcacheError(
        "no node of the Ray cluster has room for a worker", code="ray-no-room", found=there,
        expected=f"a node with {threads} cores and {gpus:g} GPUs", fix=(fix or "--cpus-per-worker 1", "other nodes"),
    )  # fmt: skip


def spread(
    calls: Sequence[Callable[[S], T]], shared: S, config: EngineConfig
) -> Iterator[tuple[int, T | EmbcacheError]]:
    """Number and answer of each call, made as a task of the cluster with what all calls share, as they are done.

    A task whose node is lost is done again on another one: calls keep what they finish, and do nothing twice.
    """
    import torch

    threads, gpus = config.cpus_per_worker or torch.get_num_threads(), config.gpus_per_worker or 0
    task: Any = ray.remote(_call).options(num_cpus=threads, num_gpus=gpus, scheduling_strategy="SPREAD")
    check_room(threads, gpus)
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    if free.get("CPU", 0) < threads:  # Ray itself would wait without a word
        log.warning("no node has cores to spare: the tasks wait for what else runs on the cluster")
    common = ray.put(pickle.dumps(shared))  # bytes: arrays that Ray shares cannot be written to
    waiting, pending, surroundings = deque(range(len(calls))), dict[Any, int](), Surroundings()
    while waiting or pending:
        check_room(threads, gpus)
        while waiting and len(pending) < (config.num_workers or len(calls)):
            number = waiting.popleft()
            pending[task.remote(calls[number], common, threads, surroundings)] = number
        done, _ = ray.wait(list(pending), timeout=1.0)
        for each in done:
            try:
                answer, notes = ray.get(each)
            except _LOST as error:
                answer, notes = EmbcacheError(
                    "the workers of a task were lost again and again", code="task-lost", found=_reason(error),
                    fix="more memory per worker, or fewer --num-workers; the same command continues",
                ), []  # fmt: skip
            except RayTaskError as error:
                raise error.cause from error
            _warn(notes)
            yield pending.pop(each), answer


def _call(call: Callable[[S], T], common: bytes, threads: int, surroundings: Surroundings) -> tuple[T, list[str]]:
    surroundings.enter(threads)
    notes = list[str]()
    with shown(notes.append, logging.WARNING):
        return call(pickle.loads(common)), notes


def _warn(notes: Iterable[str]) -> None:
    for note in notes:
        log.warning(note)


def _reason(error: RayError) -> str:
    """A few words of Ray's report."""
    because = re.search(r"because ([^.\n]+)", str(error))
    return because[1] if because else "it cannot be reached"


class RayEngine(Engine):
    """Owed shards, computed by the actors of a cluster that is connected."""

    def __init__(self, label: str, stop: Stop, config: EngineConfig, threads: int) -> None:
        self._label, self._stop, self._config, self._threads = label, stop, config, threads

    def run(self, owed: Iterable[OwedShards], job: ShardJob) -> Iterator[OwedShards]:
        """Let actors compute every owed shard; those of lost actors are computed by others.

        The actors stay from one dataset to the next, which is planned while they compute the last shards.
        """
        gpus = self._config.gpus_per_worker or 0
        pool = RayPool(job, self._threads, gpus)
        room, wanted = check_room(self._threads, gpus), self._config.num_workers
        n = min(wanted or room, room)
        log.info(f"Ray: room for {n} worker{'s' * (n > 1)}; cores of each {self._threads}, GPUs {gpus:g}")
        self._stop.others = True  # a first signal lets them commit
        try:
            with progress_bar(self._label) as bar:

                def shown_in_bar() -> Iterator[OwedShards]:
                    for shards in owed:
                        lengthen(bar, shards.rows)
                        yield shards

                yield from Dispatch(pool, shown_in_bar(), self._stop, wanted).run(bar.update)
        except SystemExit:
            if self._stop.signal is not None:  # Ray puts a status of its own in the place of a signal's
                raise SystemExit(exit_status(self._stop.signal)) from None
            raise
        finally:
            pool.close()
            self._stop.others = False

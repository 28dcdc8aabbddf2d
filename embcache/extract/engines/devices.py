"""Several devices on one machine: one process each, which share the shards of the stores by their leases.

The run itself uses the first device. The others receive their order on standard input, and stop after the current shard
when it is closed, as the system does for a run that was killed. One that dies leaves its shard to the others.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from types import TracebackType

from embcache.backbones.catalog import Backbone
from embcache.config import EngineConfig, ExtractConfig
from embcache.data.dataset import ImageDataset
from embcache.errors import UsageError
from embcache.extract.engines.engine import Engine, OwedShards, ShardJob
from embcache.extract.engines.local import Stop
from embcache.log import log
from embcache.paths import PathLike, portable_home

COMMAND = (sys.executable, "-m", "embcache.extract.extract")


def ray_connection(config: EngineConfig) -> AbstractContextManager[object]:
    """A connection to the Ray cluster of a config for as long as a ``with`` block runs; none where Ray is not named."""
    if config.engine != "ray":
        return nullcontext()
    from embcache.extract.engines.ray_cluster import connected

    return connected(config)


def split_devices(device: str) -> list[str]:
    """The devices of a run, ``"cuda:0,cuda:1"``; a single one is checked where it is used."""
    names = [name.strip() for name in device.split(",")]
    for name in names if len(names) > 1 else ():
        if name in ("", "auto"):
            raise UsageError(
                "several devices are named one by one", code="device-list", expected="cuda:0,cuda:1", found=device,
                fix="--device cuda:0",
            )  # fmt: skip
        import torch

        from embcache.extract.worker import pick_device

        index = name.removeprefix("cuda:")
        # Using a device, to see whether it is there, would occupy memory of it for as long as the run lasts.
        if not (name != index and index.isdecimal() and int(index) < torch.cuda.device_count()):
            pick_device(name)
    return names


def configs_of_others(
    backbones: Sequence[str | Backbone], devices: Sequence[str], config: ExtractConfig, threads: int
) -> list[ExtractConfig]:
    """The configs of the processes of further devices."""
    unnamed = [backbone.name for backbone in backbones if isinstance(backbone, Backbone)]
    if len(devices) > 1 and config.engine == "ray":
        raise UsageError(
            "a worker of Ray has one device", code="device-list", expected="auto", found=config.device,
            fix=f"--num-workers {len(devices)} --gpus-per-worker 1",
        )  # fmt: skip
    if unnamed and (len(devices) > 1 or config.engine == "ray"):
        raise UsageError(
            "a backbone that is an object exists in one process only, and each device or worker needs one",
            code="backbone-in-process", found=", ".join(unnamed), expected="package.module:function",
            fix="--engine local" if config.engine == "ray" else "--device cuda:0",
        )  # fmt: skip
    # This process has planned the retries: another plan would compute an image twice that is still unreadable.
    alike = replace(config, workers=threads, retry_quarantined=False, stage=None)
    return [replace(alike, device=device) for device in devices[1:]]


class DevicesEngine(Engine):
    """An engine of this process, while a crew of processes takes shards of the same dataset from the same stores."""

    def __init__(self, local: Engine, crew_for: Callable[[ImageDataset], Crew]) -> None:
        self._local, self._crew_for = local, crew_for

    def run(self, owed: Iterable[OwedShards], job: ShardJob) -> Iterator[OwedShards]:
        """Compute every owed shard that neither the crew nor any other process has committed."""
        for shards in owed:
            with self._crew_for(shards.dataset) as crew:
                complete = list(self._local.run([shards], job))
            shards.computed[:] = [sum(images) for images in zip(shards.computed, *crew.computed, strict=True)]
            yield from complete


class Crew:
    """The processes of the other devices, while a ``with`` block runs; leaving it waits for their current shards.

    ``configs`` has one config per process, whose ``device`` is that of the process.
    """

    def __init__(
        self, configs: Sequence[ExtractConfig], dataset: ImageDataset, backbones: Sequence[str], home: PathLike | None,
        stop: Stop,
    ) -> None:  # fmt: skip
        self.computed: list[list[int]] = []  # images per store, of each process that ended well
        self._configs, self._table, self._stop = configs, dataset.to_parquet_bytes() if configs else b"", stop
        self._order = {"backbones": backbones, "home": portable_home(home), "bytes": len(self._table)}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Crew:
        try:
            for config in self._configs:
                self._start(config)
        except BaseException:
            self._kill()
            raise
        self._stop.others = bool(self._processes)
        self._stop.on_request(self._close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and not isinstance(error, Exception):
                self._kill()  # a signal that does not wait: what is committed stays
            self._close()
            for thread in self._threads:
                thread.join()
        except BaseException:
            self._kill()
            raise
        finally:
            self._stop.others = False
            self._stop.forget(self._close)

    def _start(self, config: ExtractConfig) -> None:
        # A session of its own: Ctrl-C at a terminal reaches the run, which passes it on in order.
        process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._processes.append(process)
        thread = threading.Thread(target=self._follow, args=(config.device, process), daemon=True)
        thread.start()
        self._threads.append(thread)
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has died already: the thread that follows it reports it
            order = {**self._order, "config": config.to_json()}
            process.stdin.write(json.dumps(order).encode() + b"\n" + self._table)
            process.stdin.flush()

    def _follow(self, device: str, process: subprocess.Popen[bytes]) -> None:
        """Log what a process reports and how it ended; waiting for it frees its leases at once."""
        assert process.stdout is not None
        last: deque[str] = deque(maxlen=3)
        reason, done = None, False
        for raw in process.stdout:
            line = raw.decode("utf-8", "replace").rstrip()
            try:
                message = json.loads(line) if line.startswith('{"embcache"') else None
            except ValueError:
                message = None
            if message is None:
                last += [line] if line else []
            elif message["embcache"] == "note":
                log.warning(f"{device}: {message['text']}")
            elif message["embcache"] == "error":
                reason = message["text"]
            else:
                self.computed.append(message["computed"])
                done = True
        process.stdout.close()
        status = process.wait()
        if not (done or self._stop.killed):
            how = f"exit status {status}" if status >= 0 else f"signal {-status} ({signal.strsignal(-status)})"
            what = reason or how + "".join(f"\n  {line}" for line in last)
            log.warning(
                f"the process on {device} ended before its work was done; the others continue without it: {what}"
            )

    def _close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with suppress(OSError):  # it has ended
                process.stdin.close()

    def _kill(self) -> None:
        self._stop.killed = True
        for process in self._processes:
            process.kill()

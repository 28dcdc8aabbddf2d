"""Several devices on one machine: one process each, which share the shards of the stores by their leases.

The run itself is the first of them. The others are told on standard input what to compute, and stop after the shard at
hand when it is closed, which the system does for a run that was killed. One that dies leaves its shard to the rest.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch

from embcache.data.dataset import ImageDataset
from embcache.errors import EmbcacheError, UsageError
from embcache.extract.signals import Stop
from embcache.extract.worker import pick_device

COMMAND = (sys.executable, "-m", "embcache.extract.engines.devices")


def split_devices(device: str) -> list[str]:
    """The devices of a run, ``"cuda:0,cuda:1"``; one that is alone is looked at where it is used."""
    names = [name.strip() for name in device.split(",")]
    for name in names if len(names) > 1 else ():
        if name in ("", "auto"):
            raise UsageError(
                "several devices are named one by one", expected="cuda:0,cuda:1", found=device, fix="--device cuda:0"
            )
        index = name.removeprefix("cuda:")
        # Using a device, to see whether it is there, would take memory of it for as long as the run lasts.
        if not (name != index and index.isdecimal() and int(index) < torch.cuda.device_count()):
            pick_device(name)
    return names


class Crew:
    """The processes of the other devices, for the time of a ``with``; leaving it waits for the shards at hand."""

    def __init__(
        self,
        devices: Sequence[str],
        dataset: ImageDataset,
        request: Mapping[str, Any],
        stop: Stop,
        say: Callable[[str], object],
    ) -> None:
        self.computed: list[tuple[str, list[int]]] = []
        self._devices, self._dataset, self._request = devices, dataset, request
        self._stop, self._say = stop, say
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Crew:
        try:
            for device in self._devices:
                self._start(device)
        except BaseException:
            self._kill()
            raise
        self._stop.others = bool(self._processes)
        self._stop.on_ask(self._close)
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

    def _start(self, device: str) -> None:
        # A session of its own: Ctrl-C at a terminal reaches the run, which passes it on in order.
        process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._processes.append(process)
        table = self._dataset.to_parquet_bytes()
        order = {**self._request, "device": device, "bytes": len(table)}
        thread = threading.Thread(target=self._follow, args=(device, process), daemon=True)
        thread.start()
        self._threads.append(thread)
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has died already: whoever follows it tells
            process.stdin.write(json.dumps(order).encode() + b"\n" + table)
            process.stdin.flush()

    def _follow(self, device: str, process: subprocess.Popen[bytes]) -> None:
        """Hand on what a process says, and tell how it ended; its end is seen at once, so that its leases are free."""
        assert process.stdout is not None
        last: deque[str] = deque(maxlen=3)
        reason = None
        for raw in process.stdout:
            line = raw.decode("utf-8", "replace").rstrip()
            try:
                message = json.loads(line) if line.startswith('{"embcache"') else None
            except ValueError:
                message = None
            if message is None:
                last += [line] if line else []
            elif message["embcache"] == "say":
                self._say(f"{device}: {message['text']}")
            elif message["embcache"] == "error":
                reason = message["text"]
            else:
                self.computed.append((device, message["computed"]))
        status = process.wait()
        if status and not self._stop.killed:
            what = reason or f"exit status {status}" + "".join(f"\n  {line}" for line in last)
            self._say(f"the process on {device} ended before its work was done; the others go on without it: {what}")

    def _close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with suppress(OSError):  # it has ended
                process.stdin.close()

    def _kill(self) -> None:
        self._stop.killed = True
        for process in self._processes:
            process.kill()


def main() -> None:
    """One process of a crew: read the order, compute, report."""
    import signal

    from embcache.extract.extract import run_extraction

    stop = Stop()
    for number in (signal.SIGINT, signal.SIGTERM):  # a cluster sends them to every process of a job
        signal.signal(number, lambda *_: stop.ask())
    order = json.loads(sys.stdin.buffer.readline())
    dataset = ImageDataset.from_parquet_bytes(sys.stdin.buffer.read(order.pop("bytes")))

    def watch() -> None:
        sys.stdin.buffer.read()
        stop.ask()

    threading.Thread(target=watch, daemon=True).start()
    part, names = order.pop("part"), order.pop("names")
    try:
        done = run_extraction(
            names, dataset, **order, part=tuple(part) if part else None, stop=stop,
            say=lambda text: _report("say", text=text), joining=True,
        )  # fmt: skip
    except EmbcacheError as error:
        _report("error", text=str(error))
        raise SystemExit(1) from None
    _report("done", computed=[extraction.computed for extraction in done])


def _report(kind: str, **content: object) -> None:
    sys.stdout.write(json.dumps({"embcache": kind, **content}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Commands in real processes, forked from one that has imported torch: starting each anew would take seconds."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.extract.tiny_run", "embcache.cli", "embcache.probe.inputs", "pytest"])


def _run(module: str, words: tuple[str, ...], environment: dict[str, str], folder: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # A shell's background jobs, and their children, are started with interrupts ignored; a person's command is not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)
    sys.argv = ["embcache", *words]
    importlib.import_module(module).main()


class Forked:
    """``main()`` of a module, as the command line ``embcache words``; used as `subprocess.Popen` is."""

    def __init__(self, words: tuple[str, ...], module: str = "embcache.cli", **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="embcache-forked-")
        everything = {**os.environ, **environment}
        self._process = _context.Process(target=_run, args=(module, words, everything, Path(self._folder.name)))
        self._process.start()
        self._said: tuple[str, str] | None = None

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for the end; gives what was printed to stdout and stderr."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "it has not ended"
        if self._said is None:
            files = [Path(self._folder.name) / name for name in ("out", "err")]
            out, err = (file.read_text("utf-8") if file.exists() else "" for file in files)
            self._said = out, err
            self._folder.cleanup()
        return self._said


def ran(*words: str, module: str = "embcache.cli", **environment: str) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr of a command that was run to its end."""
    process = Forked(words, module, **environment)
    out, err = process.communicate()
    return process.returncode, out, err

"""Where code blocks run: ``python -m tests.docs.stage SOCKET``.

Importing torch takes seconds and pages hold dozens of commands, so one process imports everything once and forks for
each. It computes nothing itself: a fork after threads were started may hang. In the place of published networks stand
small ones with few features and weights of their own, so that every backbone is here; the built-in sample has a few
patients instead of sixty; training ends after two epochs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
import zlib
from pathlib import Path
from typing import Any


def load_small(what: Any, **options: Any) -> Any:
    """Stands for ``load_backbone``: other weights for each name, for images of any size.

    Backbones that a page makes itself are loaded as they are.
    """
    import torch
    from torch import nn

    from embcache.backbones.catalog import LoadedBackbone, find_backbone

    if not isinstance(what, str):
        return _load_backbone(what, **options)
    spec, name = find_backbone(what), what
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        convolutions = nn.Sequential(nn.Conv2d(3, 16, 7, stride=3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        module = nn.Sequential(convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, spec.dim))
    return LoadedBackbone(spec, module.eval().requires_grad_(False), f"{zlib.crc32(name.encode()):064x}", "made up")


_load_backbone: Any = None


def install() -> None:
    """Import what commands import, and put the small networks and the small sample in place."""
    import importlib
    import pkgutil

    import embcache
    import embcache.data.datasets.sample as sample
    from embcache.backbones import catalog as backbones
    from embcache.config import FinetuneConfig
    from embcache.finetune import model
    from embcache.probe.schedule import Schedule

    for module in pkgutil.walk_packages(embcache.__path__, "embcache."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    global _load_backbone
    plain, empty = backbones.load_backbone, model.empty_backbone
    _load_backbone = plain
    for module in [m for name, m in sys.modules.items() if name.startswith("embcache")]:
        if getattr(module, "load_backbone", None) is plain:
            module.load_backbone = load_small  # type: ignore[attr-defined]
        if getattr(module, "empty_backbone", None) is empty:
            module.empty_backbone = lambda spec, _: load_small(spec.name).module  # type: ignore[attr-defined]
    for config in (FinetuneConfig, Schedule):
        names = [f.name for f in dataclasses.fields(config)]
        few = zip(names, config.__init__.__defaults__ or (), strict=True)
        config.__init__.__defaults__ = tuple(2 if name.endswith("_epochs") else value for name, value in few)
    if "max_epochs" in (keywords := embcache.finetune_images.__kwdefaults__ or {}):
        keywords["max_epochs"] = 2
    for name, row in list(backbones.BACKBONES.items()):
        backbones.BACKBONES[name] = dataclasses.replace(row, dim=32)  # type: ignore[index]
    sample.GROUPS, sample.TEST_GROUPS, sample.TILES_PER_CLASS = 12, 3, 2  # type: ignore[misc]


def run_command(argv: list[str]) -> None:
    """The ``embcache`` command; does not return."""
    from embcache.cli import main

    quick = ["--max-epochs", "2"] if argv[:1] == ["finetune"] else []
    sys.argv = ["embcache", *argv, *quick]
    main()


def run_page(blocks: list[dict[str, Any]]) -> None:
    """All blocks of a page, in order: Python ones share one namespace, as in a session, bash ones a folder."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block["file"]:  # commands above it may name it
            Path(block["file"]).write_text(block["code"], "utf-8")
    for block in [b for b in blocks if not b["file"]]:
        where = f"{block['page']}:{block['line']}"
        print(f"--- {where}", flush=True)
        if block["language"] == "python":
            # The page's own line numbers, for tracebacks.
            exec(compile("\n" * block["line"] + block["code"], block["page"], "exec"), namespace)
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", block["code"]], check=False)
            if done.returncode:
                raise SystemExit(f"{where}: bash ended with {done.returncode}")


def serve(path: str) -> None:
    """Fork for each request; send its exit status back."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(path)
    server.listen(64)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # processes that wait for commands are reaped
    while True:
        client, _ = server.accept()
        if os.fork():
            client.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        server.close()
        data, fds, _, _ = socket.recv_fds(client, 1 << 20, 3)
        child = os.fork()
        if not child:
            client.close()
            _perform(json.loads(data), fds)
        _, status = os.waitpid(child, 0)
        client.send(str(os.waitstatus_to_exitcode(status) % 256).encode())
        os._exit(0)


def _perform(request: dict[str, Any], fds: list[int]) -> None:
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    status: object = 1
    try:
        if "page" in request:
            run_page(json.loads(Path(request["page"]).read_text("utf-8")))
            status = 0
        else:
            run_command(request["argv"])
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)


if __name__ == "__main__":
    install()
    serve(sys.argv[1])

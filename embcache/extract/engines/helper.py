"""The process of a further device: ``python -m embcache.extract.engines.helper``, started by `devices.Crew`."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading

from embcache.config import ExtractConfig
from embcache.data.dataset import ImageDataset
from embcache.errors import EmbcacheError
from embcache.extract.extract import extract
from embcache.extract.signals import Stop
from embcache.log import shown


def main() -> None:
    """Read the order, compute, report; stop after the current shard when standard input is closed."""
    stop = Stop()
    for number in (signal.SIGINT, signal.SIGTERM):  # a cluster sends them to every process of a job
        signal.signal(number, lambda *_: stop.request())
    order = json.loads(sys.stdin.buffer.readline())
    dataset = ImageDataset.from_parquet_bytes(sys.stdin.buffer.read(order["bytes"]))

    def watch() -> None:
        sys.stdin.buffer.read()
        stop.request()

    threading.Thread(target=watch, daemon=True).start()
    config = ExtractConfig.from_json(order["config"])
    try:
        # The run itself shows what is not a warning.
        with shown(lambda text: _report("note", text=text), logging.WARNING):
            done = extract(dataset, order["backbones"], config, home=order["home"], stop=stop)
    except EmbcacheError as error:
        _report("error", text=str(error))
        raise SystemExit(1) from None
    _report("done", computed=[extraction.computed for extraction in done])


def _report(message: str, **content: object) -> None:
    sys.stdout.write(json.dumps({"embcache": message, **content}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

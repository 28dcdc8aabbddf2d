"""``python -m embcache``, and the ``embcache`` script."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; an interrupt while its modules are imported ends the process without a traceback."""
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if default:  # background jobs of a shell ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from embcache.cli import main as run

    if default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()

"""What intervals and p-values are worth in simulated worlds with a known truth, before and after.

"Before" is the bootstrap of groups within strata of the exact set of classes that a group holds, until 0.1.0; "after"
is `embcache.probe.statistics`. `worlds.py` has the worlds and `simulations.py` the rest: this file's name hides the
standard library's module from the other scripts of this folder, so it hands that module over.

    python benchmarks/statistics.py [--repetitions 2000] [--only auc,kappa,macro,others,targets,fixed,heads,new]
"""

import sys
from pathlib import Path

_path = list(sys.path)
sys.path[:] = [folder for folder in _path if Path(folder).resolve() != Path(__file__).resolve().parent]
sys.modules.pop("statistics", None)
import statistics  # noqa: E402, F401

sys.path[:] = _path

if __name__ == "__main__":
    from simulations import main

    main(__doc__)

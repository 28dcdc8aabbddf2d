# Needs make and CPython 3.11 or newer with pip. Everything is installed into .venv, nothing outside the checkout.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check stats golden docs torture fuzz bench format clean

demo: .venv/installed
	$(BIN)/embcache demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/words.py
	$(BIN)/python tools/stats.py --check

# Lines, files, wide functions, import cycles …; LIST=--list names what counts.
stats: .venv/installed
	$(BIN)/python tools/stats.py $(LIST)

# Splits, features and scores of the working tree beside those of another revision: make golden BASE=REV.
BASE ?= HEAD
golden: .venv/installed
	$(BIN)/python -m tests.golden.compare $(BASE)

# The site, in site/: open site/index.html. A warning is an error.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Hours on two cores; needs Linux. Kills, faults and power losses at every call to the filesystem; pairs of commands, one
# paused at each of its steps; special files and hostile values in every place of a home. make torture EVERY=20 is short.
EVERY ?= 1
torture: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.crash.torture --every $(EVERY)
	for suite in pairs files values; do OMP_NUM_THREADS=1 $(BIN)/python -m tests.crash.torture --suite $$suite --every $(EVERY) || exit 1; done

# Hours; kaiko-eva is installed into an environment of its own. docs/benchmarks.md keeps what was measured.
bench: .venv/installed
	$(BIN)/python benchmarks/probing.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/attention.py --heads 5
	$(BIN)/python benchmarks/dvme.py
	$(BIN)/python benchmarks/logreg.py
	$(BIN)/python benchmarks/targets.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/reading.py
	$(BIN)/python benchmarks/shards.py
	$(BIN)/python benchmarks/extraction.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/runtimes.py
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/tsne.py
	$(BIN)/python benchmarks/statistics.py
	$(BIN)/python benchmarks/eva.py

# Hostile files, with limits on time and memory: make fuzz MINUTES=60. What fails is kept in fuzz-failures/.
MINUTES ?= 10
fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.long --minutes $(MINUTES)

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The marker is written last: its existence means a complete installation.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("embcache needs CPython 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	@# Debian's python3 without python3-venv has no ensurepip: then the pip of $(PYTHON) installs into .venv.
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	$(BIN)/python -m pip install -q -e '.[offline,dicom,dev]'
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

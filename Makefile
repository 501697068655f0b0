# make setup   build .venv or bring it up to date (Python 3.10-3.13; PYTHON=... chooses one)
# make demo    train and evaluate a detector on generated data, with pictures, curves and a report
# make demo-classification   the same for a classifier, on real handwritten digits
# make test    lint and tests (ARGS='-m "not slow"' leaves out what takes long)
# make test-parity   RT-DETR against the implementation in transformers, in an environment of its own
# make benchmark   time and memory of the models on this machine, for docs/performance.md
# make tables   the static columns of the paper's tables, for docs/tables.md
# make docs    the pages of README and docs/ as a site, in site/
# make lint    ruff and codespell
# make clean   remove both environments and what tests and builds leave

VENV := .venv
PY := $(VENV)/bin/python
# Its date tells whether .venv is older than what decides its content.
READY := $(VENV)/.ready
PARITY := .venv-parity

.PHONY: help setup demo demo-classification benchmark tables docs test test-parity lint clean

help:
	@sed -n 's/^# make /make /p' Makefile

setup: $(READY)

$(READY): setup.py pyproject.toml spartan_mm/version.py requirements/constraints.txt requirements/setup.sh
	@PYTHON='$(PYTHON)' bash requirements/setup.sh
	@touch $@

# As in tools/torchrun.sh.
demo demo-classification: export MALLOC_MMAP_MAX_ := 0
demo demo-classification: export MALLOC_TRIM_THRESHOLD_ := 18446744073709551615

demo: $(READY)
	$(PY) tools/demo.py $(ARGS)

demo-classification: $(READY)
	$(PY) tools/demo_classification.py $(ARGS)

benchmark: $(READY)
	$(PY) tools/dev/performance_docs.py $(ARGS)

tables: $(READY)
	$(PY) tools/dev/paper_tables.py $(ARGS)

# What the pages are made of, and what they link to.
PAGES := README.md CONTRIBUTING.md CHANGELOG.md CITATION.cff LICENSE docs configs requirements \
	spartan_mm
docs: $(READY)
	@rm -rf build/pages && mkdir -p build/pages && ln -s $(PAGES:%=$(CURDIR)/%) build/pages
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m codespell_lib

# One thread a process: the tensors in tests are small, and CI has few cores. Each process gets tests
# that stand together, which have their fixtures in common.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist worksteal $(ARGS)

test-parity: $(PARITY)/.ready
	OMP_NUM_THREADS=1 $(PARITY)/bin/python -m pytest -rP tests/parity $(ARGS)

$(PARITY)/.ready: $(READY) requirements/parity.txt requirements/parity.sh
	@bash requirements/parity.sh
	@touch $@

clean:
	rm -rf $(VENV) $(PARITY) build dist site *.egg-info .pytest_cache .ruff_cache

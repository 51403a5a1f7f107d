# make demo    train a real network to two slingshots under the monitor, live, then the float64 control
# make test    lint, types and the tests that take seconds (what .ci/run runs)
# make test-zoo    train some 650 small configurations of the libraries people use, and make docs/compatibility.md
# make reference    the papers' experiments in their quick form, and the table of verdicts
#
# Keep your own torch (GPU builds): `make demo VENV=/path/of/your/venv` installs into that environment
# without the pins of constraints.txt; so does `pip install -e .` by hand.

PYTHON ?= python3
VENV ?= .venv
# For instance: make demo DEMO_ARGS="--seed 1 --slingshots 3", make test PYTEST_ARGS="-k packaging"
DEMO_ARGS ?=
PYTEST_ARGS ?=
REFERENCE_ARGS ?= --jobs 2
# For instance: make test-zoo ZOO_ARGS="--only trl --details"
ZOO_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.nfi-monitor-installed
DEMO_STAMP := $(VENV)/.nfi-monitor-demo-installed
CHECKED := nfi_monitor integrations examples tests
# What an installation depends on: the C library is compiled then.
INSTALLED := pyproject.toml constraints.txt setup.py $(wildcard nfi_monitor/native/*.[ch])

# Install pinned versions only into the .venv that this file makes, never into your own environment.
ifeq ($(VENV),.venv)
PINS := -c constraints.txt
endif

# A .venv without pip is a failed installation (Debian without python3-venv): make it anew.
ifeq ($(VENV),.venv)
HAVE_VENV := $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
else
HAVE_VENV := test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
endif

.PHONY: demo test test-full test-zoo fast-tests all-tests reference lint format figure clean
.DEFAULT_GOAL := demo

# The demo installs only its own packages, a fifth of those for the tests.
$(DEMO_STAMP): $(INSTALLED)
	$(HAVE_VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PINS) -e ".[tensorboard,plots]"
	touch $@

$(STAMP): $(INSTALLED)
	$(HAVE_VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PINS) -e ".[dev]"
	touch $@ $(DEMO_STAMP)

demo: $(DEMO_STAMP)
	$(BIN)/nfi-monitor demo $(DEMO_ARGS)

# Run lint and tests in parallel: mypy uses one core, and the longest tests wait for their own processes.
test: $(STAMP)
	@$(MAKE) --no-print-directory -j 2 lint fast-tests

test-full: $(STAMP)
	@$(MAKE) --no-print-directory -j 2 lint all-tests

# One process per core, with one thread each: the tests' models are too small for more threads.
# Keep the order of files: a file of few tests may take long, and must not start last.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

fast-tests: $(STAMP)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

all-tests: $(STAMP)
	$(PYTEST) -m "slow or not slow" $(PYTEST_ARGS)

# The zoo's libraries are many, so it has an environment of its own. One process: it takes about ten minutes.
ZOO := .venv-zoo
ZOO_STAMP := $(ZOO)/.nfi-monitor-installed

$(ZOO_STAMP): $(INSTALLED) tests/zoo/requirements.txt
	$(ZOO)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(ZOO)
	$(ZOO)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -r tests/zoo/requirements.txt -e .
	touch $@

test-zoo: $(ZOO_STAMP)
	OMP_NUM_THREADS=1 $(ZOO)/bin/python -m tests.zoo $(ZOO_ARGS)

# REFERENCE_ARGS="--preset paper --jobs 8" for the papers' own sizes.
reference: $(STAMP)
	for study in parity modular_division cifar gpt; do \
		$(BIN)/python -m examples.reference.$$study $(REFERENCE_ARGS) || exit 1; \
	done
	$(BIN)/python -m examples.reference.verdicts

lint: $(STAMP)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy nfi_monitor integrations

format: $(STAMP)
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

# The picture of the README.
figure: $(STAMP)
	out=$$(mktemp -d) && $(BIN)/nfi-monitor demo --no-live --out $$out/demo && cp $$out/demo/figure.png docs/demo.png

# Delete only what this file and the tools made, never runs/ and never your own environment.
clean:
	rm -rf .venv .venv-zoo build dist nfi_monitor/native/_nfi.* *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything a developer or CI runs. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
BASE_PYTHON ?= python3
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check --quiet

CORE := $(wildcard arka/_core/*.pyx arka/_core/*.pxd)
CORE_MODULES := $(patsubst arka/_core/%.pyx,arka._core.%,$(wildcard arka/_core/*.pyx))
PYTHON_DIRS := arka tests examples bench docs setup.py
PYTHON_SOURCES = $(wildcard $(PYTHON_DIRS))

# Extra arguments for pytest, as in: make test PYTEST_ARGS="tests/wal -x"
PYTEST_ARGS ?=
# A file that gets pytest's exit status; `make` then succeeds and adds no line of its own (.ci/run).
PYTEST_STATUS ?=

# The stamps say what the environment was built from. A changed .pyx rebuilds the extensions in place,
# changed packaging reinstalls.
define install
	@test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(if $(filter pyproject.toml setup.py,$?),$(PIP) install --editable '.[$(1)]' 'setuptools>=77' 'cython>=3.1',$(PYTHON) setup.py --quiet build_ext --inplace)
	@touch $@
endef

$(VENV)/.installed-test: pyproject.toml setup.py $(CORE)
	$(call install,test)
	@touch $(VENV)/.installed-demo

$(VENV)/.installed-bench: pyproject.toml setup.py $(CORE)
	$(call install,bench)
	@touch $(VENV)/.installed-test $(VENV)/.installed-demo

$(VENV)/.installed-engines: pyproject.toml setup.py $(CORE)
	$(call install,engines)
	@touch $(VENV)/.installed-test $(VENV)/.installed-demo

$(VENV)/.installed-demo: pyproject.toml setup.py $(CORE)
	$(call install,demo)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(VENV)/.installed-test ## make the virtual environment and build the extensions

# What `make test` runs beside foreign toolchains and the simulation.
QUICK := not foreign and not engines and not simulation and not long

.PHONY: demo
demo: $(VENV)/.installed-demo ## stream 336,776 real flights to Iceberg and read them back
	$(PYTHON) examples/demo.py

# Three runs: the foreign toolchains alone, since they build with all cores; the simulation, test by test on the
# cores; then all else, file by file. Tests of processes wait half of their time: four files run on two cores, and
# tests/conftest.py mixes files that wait with files that compute.
.PHONY: test
test: lint ## everything that CI runs: all checks of `make lint`, then pytest
	@status=0; \
	$(PYTHON) -m pytest -m "foreign" $(PYTEST_ARGS) || status=$$?; \
	[ $$status -ne 5 ] || status=0; \
	$(PYTHON) -m pytest -m "simulation and not long" -n 2 --dist worksteal $(PYTEST_ARGS) || { ran=$$?; [ $$ran -eq 5 ] || status=$$ran; }; \
	$(PYTHON) -m pytest -m "$(QUICK)" -n 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS) \
		|| status=$$?; \
	if [ -n "$(PYTEST_STATUS)" ]; then echo $$status > "$(PYTEST_STATUS)"; else exit $$status; fi

.PHONY: test-long
test-long: $(VENV)/.installed-test ## what takes minutes for each test: engines that are broken on purpose, longer kills, all attacks
	$(PYTHON) -m pytest -m "long" -n 2 --dist worksteal $(PYTEST_ARGS)

# Tracing doubles the time of a run, so it is none of CI's.
.PHONY: coverage
coverage: $(VENV)/.installed-test ## which lines the tests of `make test` reach (but for simulation and foreign clients)
	$(PYTHON) -m pytest -m "$(QUICK)" -n 2 --dist loadfile \
		--cov --cov-report=term:skip-covered $(PYTEST_ARGS)

.PHONY: lint
lint: $(VENV)/.installed-test ## formatting, types, stubs, Cython, import layers
	$(PYTHON) -m ruff check $(PYTHON_SOURCES)
	$(PYTHON) -m ruff format --check $(PYTHON_SOURCES)
	$(PYTHON) -m mypy
	$(PYTHON) -m mypy.stubtest --mypy-config-file pyproject.toml --ignore-unused-allowlist \
		--allowlist arka/_core/stubtest-allowlist.txt $(CORE_MODULES)
	PATH="$(abspath $(VENV))/bin:$$PATH" cython-lint arka/_core
	$(VENV)/bin/lint-imports

.PHONY: test-conformance
test-conformance: $(VENV)/.installed-test ## foreign gRPC stacks and h2spec against a real server; toolchains required
	CONFORMANCE_REQUIRED=1 $(PYTHON) -m pytest -m foreign tests/conformance $(PYTEST_ARGS)

.PHONY: test-engines
test-engines: $(VENV)/.installed-engines ## Spark and Iceberg's Java library read and write live tables; Java and Maven required
	ENGINES_REQUIRED=1 $(PYTHON) -m pytest -m engines tests/engines $(PYTEST_ARGS)

.PHONY: test-leftovers
test-leftovers: $(VENV)/.installed-engines ## run the tests, then open every healthy table that they leave behind with every reader
	$(PYTHON) -m pytest -q -m "not foreign and not engines and not long" -n 2 --dist loadfile --basetemp=build/leftovers $(PYTEST_ARGS)
	$(PYTHON) -m tests.engines.leftovers build/leftovers

.PHONY: fuzz
fuzz: $(VENV)/.installed-test ## mutated byte streams and IPC messages, and 30 minutes of shared bytes; no finding is expected
	$(PYTHON) tests/fuzz/fuzz_wire.py --cases 1000000 --seed 1
	$(PYTHON) tests/fuzz/fuzz_ipc.py --cases 100000 --seed 1
	$(PYTHON) tests/fuzz/fuzz_shared.py --minutes 30 --seed 1

# PAIRS=1 says whether it stops, how much memory it takes and what is lost; latencies want 7 and a quiet machine.
PAIRS ?= 7
ATTACK_SECONDS ?= 5

.PHONY: attack
attack: $(VENV)/.installed-test ## clients that try to stop others, and what a neighbour feels; ATTACKS="headers view" for some
	$(PYTHON) -m tests.attacks $(ATTACKS) --pairs $(PAIRS) --seconds $(ATTACK_SECONDS)

.PHONY: soak
soak: $(VENV)/.installed-test ## 10,000 simulated histories of the engine, in parallel; no failing seed is expected
	$(PYTHON) -m arka.testing.simulation --seeds 10000

.PHONY: upserts-soak
upserts-soak: $(VENV)/.installed-test ## eight streams of upserts and deletes through SIGKILLs for 5 minutes, against a dictionary
	$(PYTHON) -m tests.process.upserts --seconds 300
	$(PYTHON) -m tests.process.upserts --seconds 60 --layout unpartitioned --layout strings --layout first

.PHONY: outage
outage: $(VENV)/.installed-test ## an object store away for 60 s under 50 MB/s of load; prints what it cost
	$(PYTHON) -m tests.services.outage --outage-s 60 --mb-per-s 50

.PHONY: bench
bench: $(VENV)/.installed-bench ## measurements beside their floors, and bench/RESULTS.md; BENCH="one-row split" for some
	$(PYTHON) -m bench $(BENCH)
	$(PYTHON) -m bench.report

.PHONY: bench-rss
bench-rss: $(VENV)/.installed-bench ## memory over 30 minutes (BENCH_MINUTES) at half of the maximum rate
	$(PYTHON) -m bench.rss

.PHONY: docs
docs: $(VENV)/.installed-test ## write the generated pages and tables again
	$(PYTHON) docs/generate_configuration.py
	$(PYTHON) examples/measure_tiers.py --write README.md

.PHONY: clean
clean: ## remove what was built, not the virtual environment
	rm -rf build dist *.egg-info .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -f arka/_core/*.so arka/_core/*.c $(VENV)/.installed-*

# Everything a checkout can do.  `make` alone lists it.
# Each target sets up what it needs: .venv is made once and again when what it is made from changes.

PYTHONS := python3.13 python3.12 python3.11 python3
BACKEND ?= default
BENCH ?= normal
LOCK := requirements/$(BACKEND).txt
BIN := .venv/bin
STAMP := .venv/installed-$(BACKEND)
FAST = LD_PRELOAD=$$($(BIN)/python -c 'from agent_memory.ops import blas; print(blas.find() or "")')
# What the fast tests compute is small: threads would wait for each other longer than they compute.
# What they write is in memory if there is room.  All tests together have a server's threads, for
# numbers are rounded otherwise with one, and a disk.
QUICK = OPENBLAS_NUM_THREADS=1 $(shell df -Pm /dev/shm 2>/dev/null | \
    awk 'NR == 2 && $$4 > 4000 { print "PYTEST_DEBUG_TEMPROOT=/dev/shm" }')
UV := $(shell command -v uv 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help install serve demo test test-all check fix bench audit lock

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

install: $(STAMP)  ## make .venv with .venv/bin/agent-memory (NVIDIA GPU: BACKEND=cuda)

serve: install  ## serve a model; flags go into ARGS="--model … --port …"
	$(BIN)/agent-memory serve $(ARGS)

demo: install  ## show in a minute what is remembered
	$(BIN)/agent-memory demo $(ARGS)

test: install  ## the fast tests
	$(FAST) $(QUICK) $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile $(ARGS)

test-all: install  ## every test, more than an hour; counts go to build/suites.jsonl
	$(FAST) $(BIN)/python -m pytest -q -p tests.suites --suites build/suites.jsonl \
	    -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: install  ## lint, format and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	! grep -nE 'https?:' requirements/*.txt

fix: install  ## mend what lint and format can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## measure a model switch and more beside mlx_lm.server (BENCH=quick, full)
	$(FAST) $(BIN)/agent-memory bench --mode $(BENCH) --out benchmarks/results $(ARGS)

audit:  ## ask PyPI for known holes in the pinned packages (needs uv and the network)
	for lock in requirements/*.txt; do \
	    uvx pip-audit --disable-pip --require-hashes -r $$lock || exit 1; done

lock:  ## pin the newest versions that fit (needs uv)
	for lock in default:cpu cuda:cuda; do uv pip compile pyproject.toml --upgrade \
	    --extra $${lock#*:} --group dev --universal --python-version 3.11 --generate-hashes \
	    --no-header --no-annotate --no-emit-index-url -o requirements/$${lock%:*}.txt -q; done

# With uv, or with nothing but Python: the same pinned files, the same result.
$(STAMP): pyproject.toml $(LOCK)
ifneq ($(UV),)
	rm -rf .venv
	uv venv -q --python '>=3.11,<3.14' .venv
	uv pip install -q --python $(BIN)/python --require-hashes -r $(LOCK)
	uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
else
	rm -rf .venv
	@for python in $(PYTHONS); do \
	    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    echo "$$python -m venv .venv"; exec $$python -m venv .venv; \
	done; echo 'Python 3.11 or newer is needed: none of $(PYTHONS) is.' >&2; exit 1
	$(BIN)/python -m pip install -q --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
endif
	@$(BIN)/python -c 'from agent_memory.ops import blas; blas.hint()'
	@touch $@

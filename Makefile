# Two commands matter: `make demo` sets up and runs the main job, `make test` sets up and passes the tests.
# PYTHON may name another interpreter (3.11), VENV another folder.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test rehearse gates setup lint bench lock clean

demo: $(READY)
	$(BIN)/edgeexit demo --from-checkpoint

# Files in the order of their names: by the number of their tests those that take minutes come last.
test: $(READY) lint
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

# What CI leaves out of boards: the whole ARM machine, large nets on ARM code, power cuts, fleets; and
# instructions counted again. Needs root and the Debian packages of .ci/run.
BOARDS = arm_answers arm_board arm_cost ansible deploy live notify releases releases_crashes \
  releases_power remote_profiling serve service_systemd

rehearse: $(READY)
	EDGEEXIT_NO_SKIPS=1 $(BIN)/python -m pytest -q --slow -m slow $(BOARDS:%=tests/test_%.py)
	$(BIN)/python bench/arm/cost.py

# Files of other frameworks, each in an environment of its own (made once, 3 GB, kept in the cache of
# bench/arm/root.py): needs Python 3.12 beside 3.11.
gates: $(READY)
	EDGEEXIT_NO_SKIPS=1 $(BIN)/python -m pytest -q --slow -m slow tests/test_gate_*.py

setup: $(READY)

lint: $(READY)
	$(BIN)/ruff format --check edgeexit tests bench examples
	$(BIN)/ruff check edgeexit tests bench examples
	$(BIN)/mypy

# torch by itself and first: only "torch==2.13.0" from a source of CPU builds avoids gigabytes of CUDA.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

bench: $(READY)
	$(BIN)/python bench/run.py

# Needs pip-tools (pip install pip-tools); torch is taken out again, see requirements.lock.
lock:
	pip-compile --quiet --extra torch --extra dev --generate-hashes --allow-unsafe --strip-extras \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
	  --no-header --no-annotate --output-file requirements.lock.new pyproject.toml
	$(PYTHON) .ci/finish_lock.py requirements.lock.new requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

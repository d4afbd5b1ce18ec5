# make demo   a running sample site: installs, starts embedded PostgreSQL and Redis, migrates, seeds, serves
# make test   everything that must pass: lint, types, tests
#
# Variables: PYTHON=python3.12  VENV=.venv  ADDR=127.0.0.1:8000  JOBS=2 (tests at a time)

PYTHON ?= python3
VENV ?= .venv
ADDR ?= 127.0.0.1:8000
JOBS ?= 2

BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.puff-installed
# exec, so that a signal to make (systemd, kill) reaches the server and not the shell around it.
MANAGE = cd sample_django_project && exec env $(SERVICES) $(BIN)/python manage.py
# Servers of your own, if you name them; else the embedded ones.
SERVICES = PUFF_EMBEDDED=$(if $(PUFF_DEFAULT_POSTGRES_URL),$(if $(PUFF_DEFAULT_REDIS_URL),0,1),1)

.PHONY: demo test lint pytest format tox compat soak bench-smoke bench-pools bench-server bench-asgi install clean
.DEFAULT_GOAL := test

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no $(PYTHON). Install Python 3.10 or newer, or name yours: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is older than 3.10. Name a newer one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "make: $(PYTHON) has no venv. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,bench]'
	@touch $@

demo: $(INSTALLED)
	@$(MANAGE) migrate --verbosity 0
	@$(MANAGE) seed --admin
	@$(MANAGE) runpuff $(ADDR)

test: lint pytest

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

pytest: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS)

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Over the supported versions of Python and Django, as far as the interpreters are installed.
tox: $(INSTALLED)
	$(BIN)/python -m pip install --quiet tox
	$(BIN)/tox run

# Other projects' own test suites, plain and patched (docs/compatibility.md); make compat SUITES="psycopg2 requests"
compat: $(INSTALLED)
	$(BIN)/python -m pip install --quiet tox
	$(BIN)/tox run -e compat -- $(SUITES)

# What `make test` runs for seconds, for a minute each: pools and restarts under load.
soak: $(INSTALLED)
	PUFF_SOAK_SECONDS=$${PUFF_SOAK_SECONDS:-60} $(BIN)/python -m pytest tests/soak -v -rP

# gunicorn -k gevent and this project's server on the sample, side by side.
bench-smoke: $(INSTALLED)
	PUFF_EMBEDDED=1 $(BIN)/python benchmarks/smoke.py

# Connections from the pools beside connections made each time.
bench-pools: $(INSTALLED)
	PUFF_EMBEDDED=1 $(BIN)/python benchmarks/pools.py

# The server beside its peers: WSGI, HTTP/2 and idle connections; ASGI beside uvicorn. Better with wrk and h2load there.
bench-server: $(INSTALLED)
	$(BIN)/python benchmarks/server.py

bench-asgi: $(INSTALLED)
	$(BIN)/python benchmarks/asgi.py

clean:
	rm -rf $(VENV) .tox .mypy_cache .pytest_cache .ruff_cache build *.egg-info

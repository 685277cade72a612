# demo: the whole path on a generated model pair.  test: all tests but the slowest.  test-rare: those.
# test-campaign: more kills and repeats of what those show, before a release.
# test-bare: the numerics in an environment of torch and numpy.  check: format, lint, types.
# lock: pins every package anew from pyproject.toml and constraints.txt.  golden: computes the golden numbers anew.
# docs: the documentation site.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BARE := .venv-bare
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check -c requirements.lock
TORCH := $(shell grep '^torch==' constraints.txt)
UV := $(shell grep '^uv==' constraints.txt)
# Each worker has a Ray cluster of its own, so there are two whatever the number of cores.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: demo test test-rare test-campaign test-bare check install lock golden docs browser services clean

install: $(STAMP)

# torch goes first and with pip, which takes a CPU build where pip is told of one. Everything else is pinned in the
# lock, so nothing is resolved: uv installs it where there is one or pip finds one, and pip itself otherwise.
$(STAMP): pyproject.toml constraints.txt requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python $(PIP_INSTALL) $(TORCH)
	@PATH="$(abspath $(BIN)):$$PATH"; \
	  if command -v uv >/dev/null || $(BIN)/python $(PIP_INSTALL) $(UV); \
	  then install="uv pip install --quiet --python $(BIN)/python"; \
	  else install="$(BIN)/python $(PIP_INSTALL)"; fi; \
	  $$install --no-deps -r requirements.lock && $$install --no-deps -e .
	@touch $(STAMP)

# torch is left out because its build depends on the machine, and CUDA's libraries because they come with torch's.
lock: install
	@PATH="$(abspath $(BIN)):$$PATH" uv pip compile pyproject.toml --quiet --all-extras --universal --python-version 3.11 \
	  --constraints constraints.txt --no-emit-package torch --no-emit-index-url --no-emit-find-links --no-annotate \
	  --no-header --upgrade | grep -vE '^(nvidia|cuda)-' > requirements.lock

demo: install
	@$(BIN)/crossray run workloads/demo.yaml

# A browser is wanted for the report's tests; without one they are skipped by name.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get update -qq && apt-get install -qq -y chromium >/dev/null; } || \
	  echo "no chromium here: browser tests will be skipped"

# Ceph's object gateway and PostgreSQL: real services for the rarest tests, which otherwise take smaller ones.
services:
	@command -v radosgw >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	      ceph-mon ceph-osd ceph-common radosgw postgresql >/dev/null; } || \
	  echo "no Ceph here: the object store of the tests will be moto's"

test: install browser
	@$(PYTEST)

test-rare: install browser services
	@$(PYTEST) -m "rare and not campaign"

test-campaign: install services
	@$(PYTEST) -m campaign

$(BARE)/.installed: constraints.txt requirements.lock
	@test -x $(BARE)/bin/python || $(PYTHON) -m venv $(BARE)
	@$(BARE)/bin/python $(PIP_INSTALL) $(TORCH) numpy
	@touch $@

test-bare: $(BARE)/.installed
	@$(BARE)/bin/python -W error tests/bare.py

# Links that lead nowhere are errors.
docs: install
	@NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --strict
	@echo "site/index.html"

golden: install
	@$(BIN)/python -m tests.golden.regenerate

check: install
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) $(BARE) runs build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache

# demo: the whole path on a generated model pair.  test: the same install, all tests but the slowest.
# test-rare: those.  check: format, lint, types.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-rare check install browser services clean

install: $(STAMP)

# torch goes first and exactly pinned: a range would pull the CUDA packages where only a CPU build is wanted.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hub,lora,spread,triton,test,check]'
	@touch $(STAMP)

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
	@$(BIN)/python -m pytest

test-rare: install browser services
	@$(BIN)/python -m pytest -m rare

check: install
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

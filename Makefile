# make image PROMPT="a red apple"    draws a picture; ARGS="--steps 30 ..." goes to scripts/txt2img.py
# make setup | test | lint            PYTHON=python3.12 chooses the interpreter of the virtual environment
# make verify                         downloads the pinned files from PyPI and compares them with hashes.txt
# make bench                          measures speed and memory against others; ARGS=--quick: a small trial
# make peers                          gets those others besides diffusers, into .peers/ (3 GB)
# make evaluate                       measures the quality of the embedded model's pictures

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= a red apple
ARGS ?=
# The recipe reads the prompt from its environment, so that any character may stand in it.
export PROMPT

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
FAILED := { echo "Set-up failed, see above. It needs Python 3.10 or newer with its venv module (PYTHON= chooses one) and, the first time, a network connection or another package index that pip knows." >&2; exit 1; }

.PHONY: image setup test lint bench peers evaluate

image: $(INSTALLED)
	@$(BIN)/python scripts/txt2img.py --prompt="$$PROMPT" $(ARGS)

setup: $(INSTALLED)

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

verify: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
		--dry-run --ignore-installed -r hashes.txt

bench: $(INSTALLED_DEV)
	$(BIN)/python -m benchmarks.speed $(ARGS)

peers: $(INSTALLED_DEV)
	$(BIN)/python -m benchmarks.peers

evaluate: $(INSTALLED_DEV)
	$(BIN)/python -m benchmarks.evaluate $(ARGS)

# These two files mark a set-up that succeeded: nothing is done again until the requirements change.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VENV) >&2 && $(INSTALL) -e . >&2 || $(FAILED)
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@$(INSTALL) -e ".[dev]" >&2 || $(FAILED)
	@touch $@

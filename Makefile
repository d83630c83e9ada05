# make demo: draw, describe and chat with the shipped model.   make test: everything a change must pass.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
# The first interpreter of 3.10 to 3.12 that really runs.
FIND_PYTHON = for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 && echo $$p && exit 0; done; exit 1
# Without an NVIDIA driver the CPU build of torch is enough; a plain `torch` may bring gigabytes of CUDA.
TORCH = $$(command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)

.PHONY: help demo test test-all style tiny clean
help:
	@sed -n 's/^# make/make/p' Makefile; echo "make tiny: train the shipped model from nothing.   make style: format."

.venv/base: pyproject.toml
	@python=$$($(FIND_PYTHON)) || { echo "Python 3.10, 3.11 or 3.12 is needed, and none was found." >&2; exit 1; }; \
	echo "installing into .venv with $$($$python --version), about two minutes ..."; \
	$$python -m venv .venv && $(BIN)/pip install --quiet --no-compile --disable-pip-version-check $(TORCH) 2> >(grep -v WARNING >&2) && \
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -e . 2> >(grep -v WARNING >&2)
	@touch $@

.venv/dev: .venv/base
	@echo "installing the test tools ..."; $(BIN)/pip install --quiet --no-compile --disable-pip-version-check -e '.[dev]' 2> >(grep -v WARNING >&2)
	@touch $@

demo: .venv/base
	@$(BIN)/python -m unimm.demo

# The emoji font is for rendering worlds; tests that need it are skipped where it cannot be had.
font:
	@fc-list 2>/dev/null | grep -q NotoColorEmoji || [ -f /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf ] || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq >/dev/null && \
	apt-get install -y -qq fonts-noto-color-emoji >/dev/null; } || echo "no emoji font; its tests are skipped"
.PHONY: font

test: .venv/dev font
	$(BIN)/ruff check unimm tests examples
	$(BIN)/ruff format --check unimm tests examples
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: .venv/dev font
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m ''

style: .venv/dev
	$(BIN)/ruff format unimm tests examples
	$(BIN)/ruff check --fix unimm tests examples

# Every stage goes on where it stopped, and a finished one is left alone.
RECIPES := recipes/tiny
RUNS := runs
CARD := model_cards/unimm-tiny
TRIALS := 200
tiny: .venv/base font
	$(BIN)/unimm train $(RECIPES)/codec.yaml
	$(BIN)/unimm train $(RECIPES)/detokenizer.yaml
	$(BIN)/unimm train $(RECIPES)/pretrain.yaml
	$(BIN)/unimm train $(RECIPES)/sft.yaml
	$(BIN)/unimm export $(RUNS)/tiny-sft/model $(CARD) --detokenizer $(RUNS)/tiny-detokenizer/model --limit $(TRIALS)

clean:
	rm -rf .venv demo_output .pytest_cache .mypy_cache .ruff_cache

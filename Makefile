# `make` lists the targets. Everything lives in .venv and .cache; `make clean` removes both.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SPEC ?= loadtests/specs/demo.yaml
MODEL := .cache/models/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench gpu lint types lock clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

setup: $(VENV)/ready ## virtual environment with the pinned versions (CPU builds of torch and vLLM)

$(VENV)/ready: requirements/cpu.txt requirements/overrides.txt requirements/install.sh pyproject.toml kilocopy/drain.c kilocopy/events.c
	@PYTHON="$(PYTHON)" bash requirements/install.sh $(VENV)
	@touch $@

demo: setup ## train the demo model (once), serve 2 replicas, drive 1..64 copies, print and write the report
	@$(BIN)/kilocopy train --out $(MODEL)
	@$(BIN)/kilocopy run $(SPEC)

test: setup ## lint, types and all tests, with the real Ray, vLLM and Locust
	@bash requirements/test_tools.sh
	@$(MAKE) --no-print-directory lint types
	@failed=0; \
	$(BIN)/python -m pytest -m "not alone" -n 2 --dist loadfile || failed=1; \
	$(BIN)/python -m pytest -m alone || failed=1; \
	exit $$failed

bench: setup ## how many streams one core reads honestly, beside a loop in C and other load generators (ARGS=--quick: a minute)
	@$(BIN)/python -m bench $(ARGS)

gpu: ## measure one GPU host whole: an 8B's shape to 1,024 copies, bare vLLM beside it, the meter (docs/gpu.md; ARGS=--rehearse: on the CPU)
	@python=$$(bash requirements/gpu_python.sh $(ARGS)) && "$$python" -m gpu $(ARGS)

lint: setup ## ruff
	@$(BIN)/ruff check .

types: setup ## mypy, strict
	@$(BIN)/mypy

lock: setup ## recompile the pinned requirements from requirements/*.in
	@bash requirements/lock.sh $(CURDIR)/$(BIN)/uv

clean: ## remove the virtual environment, caches and the trained model (runs/ stays)
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis

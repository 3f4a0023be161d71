# Every target sets up what it needs. Variables: PYTHON, VENV, JOBS (tests at once); for serve also MODEL, ADAPTERS, HOST, PORT, ARGS.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PY = $(abspath $(VENV))/bin/python

MODEL ?= checkpoints/demo/model
ADAPTERS ?= $(if $(filter checkpoints/demo/model,$(MODEL)),checkpoints/demo/adapters)
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
NAME = $(if $(filter checkpoints/demo/model,$(MODEL)),--served-model-name sloraj-demo)
TRY = $(if $(filter checkpoints/demo/model,$(MODEL)),{"model": "shift-3"$(,) "prompt": "hello world =>"$(,) "temperature": 0},{"prompt": "Hello"})
, := ,

ENSURE = bash .ci/ensure "$(VENV)" "$(PYTHON)"

.PHONY: serve test check test-gpu test-oracle fmt bench

serve:  ## serve a model and its adapters; without variables, the demo
	@$(ENSURE) $$(bash .ci/cuda_extra)
	@echo "Once it is ready, try:"
	@echo "  curl -s http://$(HOST):$(PORT)/v1/completions -H 'Content-Type: application/json' -d '$(subst ",\",$(TRY))'"
	@exec $(PY) -m serving serve "$(MODEL)" $(if $(ADAPTERS),--adapters-dir "$(ADAPTERS)") $(NAME) --host "$(HOST)" --port "$(PORT)" $(ARGS)

test: check  ## everything that needs no GPU
	JAX_PLATFORMS=cpu $(PY) -m pytest -q -n $(JOBS) $(ARGS)

check:  ## format, lint, types, import contracts
	@$(ENSURE) test
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	PYTHONPATH=. $(dir $(PY))lint-imports --no-cache

test-gpu:  ## kernels and engine on a GPU
	@$(ENSURE) $$(bash .ci/cuda_extra) test
	JAX_PLATFORMS=cuda,cpu $(PY) -m pytest -q -m gpu $(ARGS)

test-oracle:  ## compare with transformers and PEFT; install torch, peft and transformers first
	@$(ENSURE) test
	JAX_PLATFORMS=cpu $(PY) -m pytest -q -m oracle $(ARGS)

fmt:  ## rewrite files in the house format
	@$(ENSURE) test
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench:  ## the paper's evaluation: sweeps, report, summary; ARGS: names of shards, or --quick
	@$(ENSURE) $$(bash .ci/cuda_extra) bench
	$(PY) -m bench $(ARGS)

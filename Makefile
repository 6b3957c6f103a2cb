# Everything runs from .venv, which `make install` makes from requirements.lock. A second run reuses it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed-$(shell cat requirements.lock pyproject.toml | sha256sum | cut -c1-16)
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for name in python3.11 python3.12 python3; do \
	if $$name -c '$(SUPPORTED)' 2>/dev/null; then echo $$name; break; fi; done)

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install
install: $(STAMP) ## Make .venv with every dependency, by hash

.PHONY: demo
demo: $(STAMP) ## Go the whole way on this machine; ARGS= for 'kintsugi demo'
	@$(BIN)/kintsugi demo $(ARGS)

.PHONY: test
test: $(STAMP) ## Run the tests; ARGS= for pytest
	@infra/get-debian nginx nginx > /dev/null || echo "warning: the tests of the gateway are skipped" >&2
	@infra/get-debian kubernetes-client kubectl > /dev/null || echo "warning: the tests of the KubeRay manifests are skipped" >&2
	@infra/get-debian prometheus promtool > /dev/null || echo "warning: the tests of the monitoring are skipped" >&2
	$(BIN)/pytest $(ARGS)

.PHONY: test-cluster
test-cluster: $(STAMP) hosts ## Run the tests on several hosts, which root makes of namespaces here, and of autoscaling; ARGS= for pytest
	$(BIN)/pytest -m "" tests/infra/hosts tests/infra/autoscaling $(ARGS)

.PHONY: hosts
hosts: ## Install Debian's iproute2, nftables and redis-server, which hosts made of namespaces need; root
	@command -v ip > /dev/null && command -v nft > /dev/null && command -v redis-server > /dev/null || \
	{ apt-get update -qq && apt-get install -y -qq --no-install-recommends iproute2 nftables redis-server > /dev/null; }

.PHONY: nginx
nginx: ## Unpack Debian's nginx into .kintsugi, unless there is one already
	@infra/get-debian nginx nginx

.PHONY: kubectl
kubectl: ## Unpack Debian's kubectl into .kintsugi, unless there is one already
	@infra/get-debian kubernetes-client kubectl

.PHONY: prometheus
prometheus: ## Unpack Debian's prometheus into .kintsugi, unless there is one already
	@infra/get-debian prometheus promtool

.PHONY: check
check: $(STAMP) ## Lint, format, types, import arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

.PHONY: format
format: $(STAMP) ## Rewrite the code in its one style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

.PHONY: lock
lock: $(BIN)/uv ## Write requirements.lock anew from pyproject.toml; ARGS=--upgrade for newer versions
	$(BIN)/uv pip compile pyproject.toml --extra dev --generate-hashes --python-version 3.11 \
		--no-emit-index-url --no-header --quiet $(ARGS) -o requirements.lock

.PHONY: bench-quality
bench-quality: $(STAMP) ## Measure restoration on a folder of real tiles; ARGS="FOLDER --limit 20" shortens it
	$(BIN)/python tests/benchmarks/bench_quality.py $(ARGS)

.PHONY: bench-train
bench-train: $(STAMP) ## Measure training against torchrun and against data in memory, and on a GPU if there is one
	$(BIN)/python tests/benchmarks/bench_train.py $(ARGS)
	$(BIN)/python tests/benchmarks/bench_train_gpu.py

.PHONY: bench-tune
bench-tune: $(STAMP) ## Measure searches on a folder of real tiles, and kill some; ARGS="FOLDER --kills 3" shortens it
	$(BIN)/python tests/benchmarks/bench_tune.py $(ARGS)

.PHONY: bench-serve
bench-serve: $(STAMP) ## Measure the service against other servers, overloaded, and autoscaling; ARGS="--only overhead" shortens it
	$(BIN)/python tests/benchmarks/bench_serve.py $(ARGS)

.PHONY: bench-large
bench-large: $(STAMP) ## Measure the memory and disk that an image of 8192 x 51200 px takes; ARGS="--height 5120" shortens it
	$(BIN)/python tests/benchmarks/bench_large.py $(ARGS)

.PHONY: bench-submit
bench-submit: $(STAMP) ## Measure how soon a submitted job speaks, on a stack of its own; ARGS="--repeats 3" shortens it
	$(BIN)/python tests/benchmarks/bench_submit.py $(ARGS)

.PHONY: bench-hosts
bench-hosts: $(STAMP) hosts ## Measure training across two hosts against one, made of namespaces; ARGS="--repeats 1" shortens it
	$(BIN)/python tests/benchmarks/bench_hosts.py $(ARGS)

.PHONY: chaos-serve
chaos-serve: $(STAMP) nginx ## Kill, spoil and starve a service under load; ARGS="--requests 500 --rollouts 3" shortens it
	$(BIN)/python tests/benchmarks/chaos_serve.py $(ARGS)
	$(BIN)/python tests/benchmarks/fuzz_uris.py

.PHONY: chaos-train
chaos-train: $(STAMP) ## Kill workers, nodes, drivers and writers of a training; ARGS="--kills 3 --writers 10" shortens it
	$(BIN)/python tests/benchmarks/chaos_train.py $(ARGS)

.PHONY: wheel
wheel: $(STAMP) ## Build the wheel that nodes and images install, in dist
	rm -f dist/kintsugi-*.whl
	$(BIN)/uv build --quiet --wheel --no-build-isolation --python $(BIN)/python --out-dir dist

.PHONY: image-check
image-check: wheel ## Run the Dockerfile's steps in a folder of Debian, as root, with debootstrap; GBs of disk
	$(BIN)/python infra/docker/try_install.py

.PHONY: down
down: $(STAMP) ## Stop the local stack
	@$(BIN)/kintsugi down

.PHONY: clean
clean: ## Remove caches and builds; .venv and the data in .kintsugi stay
	rm -rf dist .pytest_cache .ruff_cache .import_linter_cache
	find platform tune serve tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	rm -f .venv/.installed-*
	touch $@

# uv, too, comes by its hash: pip reads only uv's own lines of the lock.
$(BIN)/uv:
	@test -n "$(PYTHON)" || { echo "error: kintsugi needs Python 3.11 or 3.12: sudo apt-get install python3.11 python3.11-venv" >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip" 2>/dev/null || { echo "error: $(PYTHON) cannot make a virtual environment: sudo apt-get install" \
		"$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	awk '/^uv==/ {wanted = 1} wanted {print} wanted && !/\\$$/ {exit}' requirements.lock > .venv/uv.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.lock

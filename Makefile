# make help lists the targets. MAT, URL, OUT, DATA, RUN, START, MIRROR, DRIVE and ARGS can be given: make convert MAT=/content/x.mat
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
# The best of the recipes compared (docs/training.md). RECIPE= goes back to the flags' defaults.
RECIPE ?= --size 64 --width 16 --batch-size 32 --lr 2e-3 --epochs 40
# The network first learns the classes of the pixels, in a run of its own, where the set has them. START= begins with the scenes.
HAS_LABELS = $(shell ls -d "$(DATA)"/label* "$(DATA)"/*/label* 2>/dev/null | head -n 1)
START ?= $(if $(and $(RECIPE),$(HAS_LABELS)),$(if $(findstring --model,$(ARGS))$(findstring --weights,$(ARGS)),,$(RUN)-parts))
EXPECT := on a stand-in of the set, official test rows, three runs of 40 epochs of parts and 40 of scenes, 10 to 15 minutes on 2 cores: \
13 classes top-1 59 %, mean class 43 %; 10 classes 59 % and 52 %, where always the most frequent class gives 29 %
PYTHON ?= python3

# On Colab the system's Python is used and nothing it has is replaced; elsewhere a .venv is made.
ifdef COLAB_RELEASE_TAG
PY := $(PYTHON)
PINS := $(AT).installed-colab.txt
READY := $(AT).installed-colab
else
PY := $(AT).venv/bin/python
PINS := constraints.txt
READY := $(AT).venv/installed
endif

# A read-only folder cannot be installed from, and need not be: make runs the packages where they lie.
ifeq ($(WRITABLE),yes)
WHAT := -e '.[fast,show,remote]'
else
WHAT := $$($(PY) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	x = p['optional-dependencies']; print(*p['dependencies'] + x['fast'] + x['show'] + x['remote'])")
endif
INSTALL := $(PY) -m pip install --quiet -c $(PINS) $(WHAT)

.PHONY: demo convert train test verify inspect push pull bench bench-memory bench-convert bench-step stress lint clean help drive-given
.DEFAULT_GOAL := help

$(AT).venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(AT).venv
	$(INSTALL)
	touch $@

$(AT).installed-colab: pyproject.toml
	mkdir -p $(@D)
	$(PY) -m pip list --format freeze 2>/dev/null | grep -iE '^(torch|numpy|h5py)==' > $(PINS)
	$(INSTALL)
	touch $@

.venv/dev: $(READY)
	$(PY) -m pip install --quiet -c $(PINS) -e '.[fast,show,remote,dev]'
	mkdir -p .venv && touch $@

demo: $(READY)  ## made-up rooms: build, convert, train, pictures (under 2 minutes after the install)
	rm -rf $(AT)demo
	$(PY) -m convert sample $(AT)demo/rooms.mat --rows 192
	$(PY) -m convert run $(AT)demo/rooms.mat --out $(AT)demo/data
	$(PY) -m convert inspect $(AT)demo/data --picture $(AT)demo/rooms.png
	$(PY) -m train --data $(AT)demo/data --out $(AT)demo/run --num-classes 10 --epochs 8 --batch-size 16 --width 16 --size 96
	@echo "pictures: $(AT)demo/rooms.png $(AT)demo/run/curves.png $(AT)demo/run/confusion.png $(AT)demo/run/mistakes.png"

convert: $(READY)  ## shards on this disk, the cheapest way: make convert [DRIVE=/content/drive/MyDrive/nyuv2] [MAT=x.mat]
	$(PY) -m convert run $(if $(MAT),"$(MAT)") --out "$(OUT)" $(if $(DRIVE),--drive "$(DRIVE)") $(if $(URL),--url "$(URL)") $(ARGS)

train: $(READY)  ## train on the shards; continues by itself: make train [MIRROR=/content/drive/MyDrive/run] [ARGS='--epochs 30']
	@echo "$(EXPECT)"
	$(if $(START),@test -f "$(START)/classes.csv" || \
	$(PY) -m train --data "$(DATA)" $(RECIPE) $(ARGS) --task semantic40 --mirror "$(if $(MIRROR),$(MIRROR)-parts)" --out "$(START)")
	$(PY) -m train --data "$(DATA)" --out "$(RUN)" $(if $(START),--weights "$(START)") $(if $(MIRROR),--mirror "$(MIRROR)") $(RECIPE) $(ARGS)

test: .venv/dev  ## every test
	$(PY) -m pytest $(ARGS)

verify: $(READY)  ## check every byte of the shards
	$(PY) -m convert verify "$(DATA)" $(ARGS)

inspect: $(READY)  ## what is in the shards
	$(PY) -m convert inspect "$(DATA)" $(ARGS)

push: $(READY) drive-given  ## copy the shards to Drive: make push DRIVE=/content/drive/MyDrive/nyuv2
	$(PY) -m convert push "$(DATA)" "$(DRIVE)"

pull: $(READY) drive-given  ## copy the shards from Drive: make pull DRIVE=/content/drive/MyDrive/nyuv2
	$(PY) -m convert pull "$(DRIVE)" "$(OUT)"

drive-given:
	@test -n "$(DRIVE)" || { echo "Say which folder: make $(MAKECMDGOALS) DRIVE=/content/drive/MyDrive/nyuv2" >&2; exit 2; }

bench-convert: $(READY)  ## converting against its floor: make bench-convert MAT=x.mat
	$(PY) -m bench.convert "$(MAT)" --profile $(ARGS)

bench: $(READY)  ## loader speed on these shards; with MAT=x.mat the note's method too
	$(PY) -m bench.loader "$(DATA)" $(if $(wildcard $(MAT)),--mat "$(MAT)") $(ARGS)

bench-memory: $(READY)  ## memory by number of workers, the note's method beside it: make bench-memory MAT=x.mat
	$(PY) -m bench.memory "$(DATA)" $(if $(wildcard $(MAT)),--mat "$(MAT)") $(ARGS)

bench-step: $(READY)  ## what the loader costs a training step
	$(PY) -m bench.step --data "$(DATA)" $(ARGS)

stress: .venv/dev  ## what takes longer than the tests: hundreds of kills and damages
	$(PY) -m pytest -m stress -o faulthandler_timeout=1500 $(ARGS)

lint: .venv/dev  ## ruff and mypy
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

clean:  ## remove the demo and the caches, never data or runs
	rm -rf $(AT)demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ #/' | column -t -s '#'

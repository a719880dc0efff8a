# make help lists the targets. MAT, OUT, DATA, RUN, DRIVE and ARGS can be given: make convert MAT=/content/x.mat
SHELL := /bin/bash
MAT ?= nyu_depth_v2_labeled.mat
OUT ?= data
DATA ?= $(OUT)
RUN ?= runs/scene
DRIVE ?=
ARGS ?=
PYTHON ?= python3

# On Colab the system's Python is used and nothing it has is replaced; elsewhere a .venv is made here.
ifdef COLAB_RELEASE_TAG
PY := $(PYTHON)
PINS := .installed-colab.txt
READY := .installed-colab
else
PY := .venv/bin/python
PINS := constraints.txt
READY := .venv/installed
endif

.PHONY: demo convert train test verify inspect push pull bench bench-memory bench-convert bench-step stress lint clean help
.DEFAULT_GOAL := help

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt -e '.[fast,show]'
	touch $@

.installed-colab: pyproject.toml
	$(PY) -m pip list --format freeze 2>/dev/null | grep -iE '^(torch|numpy|h5py)==' > $(PINS)
	$(PY) -m pip install --quiet -c $(PINS) -e '.[fast,show]'
	touch $@

.venv/dev: $(READY)
	$(PY) -m pip install --quiet -c $(PINS) -e '.[fast,show,dev]'
	mkdir -p .venv && touch $@

demo: $(READY)  ## made-up rooms: build, convert, train, pictures (under 2 minutes after the install)
	rm -rf demo
	$(PY) -m convert sample demo/rooms.mat --rows 192
	$(PY) -m convert run demo/rooms.mat --out demo/data
	$(PY) -m convert inspect demo/data --picture demo/rooms.png
	$(PY) -m train --data demo/data --out demo/run --num-classes 10 --epochs 8 --batch-size 16 --width 16 --size 96
	@echo "pictures: demo/rooms.png demo/run/curves.png demo/run/confusion.png demo/run/mistakes.png"

convert: $(READY)  ## the .mat into shards: make convert MAT=nyu_depth_v2_labeled.mat
	$(PY) -m convert run "$(MAT)" --out "$(OUT)" $(ARGS)

train: $(READY)  ## train on the shards; continues by itself: make train ARGS='--epochs 30'
	$(PY) -m train --data "$(DATA)" --out "$(RUN)" $(ARGS)

test: .venv/dev  ## every test
	$(PY) -m pytest $(ARGS)

verify: $(READY)  ## check every byte of the shards
	$(PY) -m convert verify "$(DATA)" $(ARGS)

inspect: $(READY)  ## what is in the shards
	$(PY) -m convert inspect "$(DATA)" $(ARGS)

push: $(READY)  ## copy the shards to Drive: make push DRIVE=/content/drive/MyDrive/nyuv2
	$(PY) -m convert push "$(DATA)" "$(DRIVE)"

pull: $(READY)  ## copy the shards from Drive
	$(PY) -m convert pull "$(DRIVE)" "$(OUT)"

bench-convert: $(READY)  ## converting against its floor: make bench-convert MAT=x.mat
	$(PY) -m bench.convert "$(MAT)" $(ARGS)

bench: $(READY)  ## loader speed on these shards
	$(PY) -m bench.loader "$(DATA)" $(ARGS)

bench-memory: $(READY)  ## memory by number of workers, the note's method beside it: make bench-memory MAT=x.mat
	$(PY) -m bench.memory "$(DATA)" $(if $(wildcard $(MAT)),--mat "$(MAT)") $(ARGS)

bench-step: $(READY)  ## what the loader costs a training step
	$(PY) -m bench.step --data "$(DATA)" $(ARGS)

stress: .venv/dev  ## what takes longer than the tests: hundreds of kills and damages
	$(PY) -m pytest -m stress $(ARGS)

lint: .venv/dev  ## ruff and mypy
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

clean:  ## remove the demo and the caches, never data or runs
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ #/' | column -t -s '#'

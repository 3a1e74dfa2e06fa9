# make demo   pictures drawn from text by models trained on this machine, in minutes on two CPU cores
# make test   the tests;  make check   style, types, spelling and the fast tests;  make exhaustive   the longest tests
# make study  what helps pictures more, a larger text encoder or a larger denoiser: docs/study.md, in 90 minutes
# make demo-pairs  after make demo: two objects in the relation of the prompt: docs/train-unet.md
# make demo-lora   after make demo: its model learns a ninth colour from 40 pictures: docs/lora.md
# make demo-sd3    after make demo: a small Stable Diffusion 3 on the same scenes: docs/stable-diffusion-3.md
# make demo-image-prompt  after make demo: its model learns to follow pictures beside text: docs/image-prompts.md
# make demo-ar     after make demo: a model that writes pictures token by token: docs/train-ar.md
# make gallery   every demo that has been run side by side, on one page: runs/gallery/index.html
# make demo-cascade  after make demo: 16 px from text, enlarged to 64 px, without an autoencoder: docs/pixels.md
# make demo-unclip after make demo: a prior and a decoder of its CLIP's image embeddings: docs/unclip.md
# make faults kills, signals, full disks, damaged files: everything a run must survive, in a table
#
# Where PyPI's torch would bring CUDA along and is not wanted:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2 --dist worksteal
FAULTS_FLAGS ?=

BIN := $(VENV)/bin
LDM := $(BIN)/ldm
# Every version is pinned, torch's too. pip would compile on one core, and with torch/testing files for other Pythons; of
# transformers and diffusers, two thirds are models and pipelines that nothing here imports.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile $(PIP_FLAGS) --constraint constraints.txt --editable
UNUSED := torch/testing|/(tests|pip|setuptools|mypy)/
UNUSED := $(UNUSED)|transformers/models/(?!auto/|clip/|siglip/)\w+/|diffusers/pipelines/(?!stable_diffusion/)\w+/
COMPILE = $(BIN)/python -m compileall -q -j 0 -x '$(UNUSED)' $(VENV)/lib
INSTALLED := $(VENV)/.installed
TESTED := $(VENV)/.installed-test

# Where docs/words.txt holds.
WRITTEN := README.md Makefile pyproject.toml docs ldm_cli recipes scripts benchmarks

SHELL := /bin/bash -o pipefail

.PHONY: faults setup demo demo-ar demo-cascade demo-image-prompt demo-lora demo-pairs demo-sd3 demo-unclip study gallery test \
  exhaustive check lint bench gpu-check clean

setup: $(TESTED)

# The stamps come last: an interrupted installation is done again, a finished one is not.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ldm needs Python 3.11 or newer: make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) $(1)
	$(COMPILE)
	@touch $(2)
endef

$(INSTALLED): pyproject.toml constraints.txt
	$(call install,.,$@)

# With what only tests and style checks need, diffusers and transformers among it.
$(TESTED): pyproject.toml constraints.txt
	$(call install,".[test]",$(INSTALLED) $@)

# Two ranks of one thread each train faster than two threads: the demo's operations are too small to be shared out.
demo: $(INSTALLED)
	$(LDM) data synth data/demo --samples 20000 --size 32 --seed 0 --two-object-fraction 0.1
	$(LDM) train-vae demo/vae --nproc 2
	$(LDM) train-clip demo/clip --nproc 2
	$(LDM) precompute demo/unet --out data/demo/cache --nproc 2
	$(LDM) train-unet demo/unet cache=data/demo/cache --nproc 2
	$(LDM) sample demo/sample
	$(LDM) eval demo/eval --out runs/demo-eval
	@echo "Look at runs/demo-samples/grid.png; runs/demo-eval/eval.json has the numbers. And now:"
	@echo '  $(abspath $(LDM)) sample --model runs/demo-unet -p "a large green star" -n 4'
	@echo "  $(abspath $(LDM)) report runs/demo-unet       its curves and samples as one page"
	@echo "  make demo-pairs, demo-ar, demo-unclip …        other generators on the same scenes"

# After `make demo`, whose CLIP and autoencoder it takes: a U-Net of two objects that trains the text tower, too.
PAIRS := -p "a yellow star left of a purple ring" -p "a purple ring left of a yellow star"
PAIRS += -p "a red circle above a blue square" -p "a green triangle below an orange cross"
demo-pairs: $(INSTALLED)
	$(LDM) data synth data/demo-pairs --samples 20000 --size 32 --seed 2 --two-object-fraction 0.5
	$(LDM) precompute demo/pairs --out data/demo-pairs/cache --nproc 2
	$(LDM) train-unet demo/pairs cache=data/demo-pairs/cache --nproc 2
	$(LDM) sample --model runs/demo-pairs $(PAIRS) -n 4 --steps 20 --guidance 2.5 --out runs/demo-pairs-samples
	$(LDM) eval demo/pairs-eval --out runs/demo-pairs-eval
	@echo "Look at runs/demo-pairs-samples/grid.png; runs/demo-pairs-eval/eval.json has the numbers."

# After `make demo`, whose scenes and CLIP it takes: a VQ model, and a Transformer that writes pictures code by code.
demo-ar: $(INSTALLED)
	$(LDM) train-vae demo/vq --nproc 2
	$(LDM) precompute demo/ar --out data/demo/codes
	OMP_NUM_THREADS=1 $(LDM) train-ar demo/ar cache=data/demo/codes --nproc 2
	$(LDM) sample --model runs/demo-ar -p "a large red circle" -p "a blue square" -p "a green triangle" -n 4 \
	  --guidance 1.5 --top-p 0.95 --best-of 8 --clip runs/demo-clip/model --out runs/demo-ar-samples
	$(LDM) eval demo/ar-eval --out runs/demo-ar-eval
	@echo "Look at runs/demo-ar-samples/grid.png; runs/demo-ar-eval/eval.json has the numbers."

# After `make demo`: the model learns a ninth colour from 40 pictures, and is measured before and after: docs/lora.md.
MAROON := --model runs/demo-unet -p "a maroon circle" -p "a maroon star" -p "a red circle" -p "a blue square" -n 4
MAROON += --steps 20 --guidance 2.5
demo-lora: $(INSTALLED)
	$(LDM) data synth data/demo-lora --samples 40 --val-samples 64 --size 32 --seed 1 --two-object-fraction 0 \
	  --only color=maroon
	OMP_NUM_THREADS=1 $(LDM) train-unet lora/demo --nproc 2
	$(LDM) sample $(MAROON) --out runs/demo-lora-before
	$(LDM) sample $(MAROON) --lora runs/demo-lora --out runs/demo-lora-after
	$(LDM) convert runs/demo-unet runs/demo-lora-merged --merge-lora runs/demo-lora --overwrite
	$(LDM) eval lora/eval --out runs/demo-lora-eval --overwrite
	$(LDM) eval lora/eval "data.shards=data/demo/val-*.tar" --out runs/demo-lora-eval-old --overwrite
	@echo "Look at runs/demo-lora-before/grid.png and runs/demo-lora-after/grid.png."

# After `make demo`: an adapter for image prompts, and what each of its scales does: docs/image-prompts.md.
demo-image-prompt: $(INSTALLED)
	$(LDM) precompute image-prompt/demo --out data/demo/cache-image-prompt
	OMP_NUM_THREADS=1 $(LDM) train-unet image-prompt/demo cache=data/demo/cache-image-prompt --nproc 2
	$(BIN)/python benchmarks/image_prompts.py
	$(LDM) sample --model runs/demo-unet -p "a square" -n 1 --steps 20 --guidance 2.5 \
	  --image-prompt runs/demo-image-prompt-scales/red-circle.png --ip-adapter runs/demo-image-prompt \
	  --xy image_scale=0,0.25,0.5,0.75,1 --xy seed=0,1,2,3 --out runs/demo-image-prompt-samples
	@echo "Look at runs/demo-image-prompt-samples/grid.png."

# After `make demo`: a transformer on its scenes, with its CLIP and a smaller one. Beside it the U-Net of `make demo` on
# the same latents; its 800 steps take about as many processor seconds as the 450 of the transformer.
UNET16 := demo/unet vae=runs/demo-vae16/model unet.in_channels=16 unet.out_channels=16
demo-sd3: $(INSTALLED)
	OMP_NUM_THREADS=1 $(LDM) train-vae sd3/demo-vae --nproc 2
	OMP_NUM_THREADS=1 $(LDM) train-clip sd3/demo-clip --nproc 2
	$(LDM) precompute sd3/demo --out data/demo/cache-sd3
	OMP_NUM_THREADS=1 $(LDM) train-unet sd3/demo cache=data/demo/cache-sd3 --nproc 2
	$(LDM) precompute $(UNET16) --out data/demo/cache-unet16
	OMP_NUM_THREADS=1 $(LDM) train-unet $(UNET16) name=demo-unet16 train.steps=800 cache=data/demo/cache-unet16 --nproc 2
	$(LDM) sample demo/sample model=runs/demo-sd3/model --out runs/demo-sd3-samples
	$(LDM) eval sd3/demo-eval --out runs/demo-sd3-eval
	@echo "Look at runs/demo-sd3-samples/grid.png; runs/demo-sd3-eval/eval.json has the numbers of both."

# After `make demo`, whose CLIP it takes: pictures of 16 px on pixels, and a model that enlarges them fourfold.
demo-cascade: $(INSTALLED)
	$(LDM) data synth data/cascade --samples 20000 --size 64 --seed 0 --two-object-fraction 0.1
	OMP_NUM_THREADS=1 $(LDM) train-unet cascade/demo-base --nproc 2
	OMP_NUM_THREADS=1 $(LDM) train-unet cascade/demo-large --nproc 2
	test -d runs/cascade/model || $(LDM) cascade cascade/demo
	$(LDM) sample demo/sample model=runs/cascade/model sampling='{images_per_prompt: 4}' --out runs/cascade-samples
	$(LDM) eval cascade/demo-eval --out runs/cascade-eval
	@echo "Look at runs/cascade-samples/grid.png; runs/cascade-eval/eval.json has the numbers."

# After `make demo`, whose scenes, CLIP and autoencoder it takes: a prior, a decoder that sees no caption, both joined.
UNCLIP := sampling.prior.scale=2 --model runs/demo-unclip --guidance 2 --steps 20
demo-unclip: $(INSTALLED)
	$(LDM) precompute prior/demo --out data/demo/cache-prior
	OMP_NUM_THREADS=1 $(LDM) train-prior prior/demo cache=data/demo/cache-prior --nproc 2
	$(LDM) precompute unclip/demo --out data/demo/cache-decoder
	OMP_NUM_THREADS=1 $(LDM) train-unet unclip/demo cache=data/demo/cache-decoder --nproc 2
	$(LDM) convert runs/demo-decoder runs/demo-unclip --prior runs/demo-prior --overwrite
	$(LDM) sample $(UNCLIP) -p "a large red circle" -p "a blue square" -n 4 --out runs/demo-unclip-samples
	$(LDM) sample $(UNCLIP) --image runs/demo-unclip-samples/00000-a-large-red-circle-0.png -n 8 \
	  --out runs/demo-unclip-variations
	$(LDM) sample $(UNCLIP) --image runs/demo-unclip-samples/00000-a-large-red-circle-0.png \
	  --image runs/demo-unclip-samples/00004-a-blue-square-0.png -n 2 --out runs/demo-unclip-between
	$(LDM) eval unclip/demo-eval --out runs/demo-unclip-eval
	$(BIN)/python benchmarks/variations.py runs/demo-unclip "data/demo/val-*.tar"
	@echo "Look at grid.png in runs/demo-unclip-samples, -variations and -between."

# Goes on after an interruption: every part is a command that does.
study: $(INSTALLED)
	$(BIN)/python benchmarks/study.py

# Takes the demos that have been run; the others are named.
gallery: $(INSTALLED)
	$(BIN)/python benchmarks/gallery.py

# One thread per process: the processes share the cores, and results do not depend on the machine.
test: $(TESTED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not exhaustive and not gpu"

# Every sampler, number of ranks and kind of loss where `make test` takes one of each, and the longest tests.
exhaustive: $(TESTED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) -m "exhaustive and not gpu"

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow and not exhaustive and not gpu"

lint: $(TESTED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/codespell --dictionary docs/words.txt --skip "*.html,*.png,docs/words.txt" $(WRITTEN)

# Every fault that a run may meet, injected for real, in a table: make faults FAULTS_FLAGS="--trials 5 --only full-disk"
faults: $(TESTED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.matrix $(FAULTS_FLAGS)

bench: $(TESTED)
	$(LDM) bench all --against all --out runs/bench.json

# Steps on a simulated device, the GPU tests, then published sizes: less than ten minutes on an H200. Without a CUDA
# device the last two are skipped, test by test, and said to be.
gpu-check: $(TESTED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/rehearsal
	$(BIN)/python -m pytest -m gpu -rs --no-fold-skipped
	@if $(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then \
	  $(LDM) bench published --device cuda --against diffusers --rounds 3 --out runs/gpu-check.json; \
	else echo "SKIPPED ldm bench published - needs a CUDA device"; fi

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find ldm_cli tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# make demo       distil the digits teacher into a four-step model, sample from it, evaluate it (no accelerator needed)
# make test       the whole test suite, lint and types, as CI runs it
# make lint       lint and types only
# make demo-lora  the same as a LoRA, attached to a fine-tune that it was not trained on
# make full       the same as make demo with seven times the training (three quarters of an hour)
# make teacher    train the digits teacher itself from scratch, and evaluate it (two hours)
# make clean      delete .venv, caches, runs and data
# PYTHON=python3.12 make …  chooses the interpreter (3.11 or newer) for .venv; RUNS=DIR make …  where results go

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUNS ?= runs
# On Linux: large pages for the memory of a step on the CPU. A quarter faster; no effect elsewhere.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

PROMPTS := --prompt="a red seven on a blue background" --prompt="a white three on a black background" \
  --prompt="a yellow five on a green background" --prompt="a black zero on a cyan background" \
  --prompt="a magenta nine on a white background" --prompt="a green two on a yellow background" \
  --prompt="a blue eight on a white background" --prompt="a cyan four on a red background" \
  --prompt="a black six on a yellow background"

.PHONY: demo demo-lora full test lint teacher clean help

TEACHER := lcm_jax/assets/digits_teacher

demo: .venv/demo
	@echo; echo "1 of 4: the teacher's images, in twenty steps"
	$(BIN)/python -m lcm_jax.sample --model=$(TEACHER) $(PROMPTS) --steps=20 --guidance-scale=3 --seed=0 --scale=6 --label --out=teacher.png
	@echo; echo "2 of 4: the student learns to need four; it prints where its images are"
	$(BIN)/python -m lcm_jax.train --config=configs/digits.py --workdir=$(RUNS)/digits
	@echo; echo "3 of 4: the student as a model folder, and its images"
	$(BIN)/python -m lcm_jax.export --workdir=$(RUNS)/digits --out=$(RUNS)/digits/lcm
	$(BIN)/python -m lcm_jax.sample --model=$(RUNS)/digits/lcm --prompt="a red seven on a blue background" --steps=4 --seed=0 --out=seven.png
	$(BIN)/python -m lcm_jax.sample --model=$(RUNS)/digits/lcm $(PROMPTS) --steps=4 --seed=0 --scale=6 --label --out=digits.png
	@echo; echo "4 of 4: student and teacher compared"
	$(BIN)/python -m lcm_jax.evaluate --model=$(RUNS)/digits/lcm
	@echo
	@echo "The four-step model:     $(RUNS)/digits/lcm (diffusers loads it too)"
	@echo "Its images:              digits.png (nine prompts, enlarged; the teacher's: teacher.png), seven.png (32 x 32)"
	@echo "Evaluation:              $(RUNS)/digits/evaluation: sheet.png beside the teacher, curves.png, table.md"
	@echo "Samples while training:  $(RUNS)/digits/samples   curves: $(RUNS)/digits/tensorboard"
	@echo "Sample more:             $(BIN)/python -m lcm_jax.sample --model=$(RUNS)/digits/lcm --prompt='a yellow three on a black background' --scale=8 --out=three.png"

# The promise of LCM-LoRA: adapters trained on the teacher let its fine-tunes and style LoRAs sample in four steps.
LORA := $(RUNS)/lora
demo-lora: .venv/demo
	$(BIN)/python -m lcm_jax.train --config=configs/digits_lora.py --workdir=$(LORA)/lcm
	$(BIN)/python -m lcm_jax.export --workdir=$(LORA)/lcm --out=$(LORA)/lcm.safetensors
	$(BIN)/python -m lcm_jax.train --config=configs/digits_italic.py --workdir=$(LORA)/italic
	$(BIN)/python -m lcm_jax.export --workdir=$(LORA)/italic --out=$(LORA)/italic/model
	$(BIN)/python -m lcm_jax.train --config=configs/digits_italic.py:lora --workdir=$(LORA)/italic_lora
	$(BIN)/python -m lcm_jax.export --workdir=$(LORA)/italic_lora --out=$(LORA)/italic.safetensors
	$(BIN)/python -m lcm_jax.evaluate --model=$(LORA)/italic/model --lora=$(LORA)/lcm.safetensors --style=italic --out=$(LORA)/on_fine_tune
	$(BIN)/python -m lcm_jax.evaluate --model=$(TEACHER) --lora=$(LORA)/lcm.safetensors --lora=$(LORA)/italic.safetensors --style=italic --out=$(LORA)/with_style
	@echo
	@echo "The LCM-LoRA:                  $(LORA)/lcm.safetensors"
	@echo "On a fine-tune on italics:     $(LORA)/on_fine_tune: sheet.png, weights.png, table.md"
	@echo "With a LoRA of that style:     $(LORA)/with_style, likewise"
	@echo "Sample more:                   $(BIN)/python -m lcm_jax.sample --model=$(LORA)/italic/model --lora=$(LORA)/lcm.safetensors --sampler=lcm --prompt='a red seven on a blue background' --scale=8 --out=seven.png"

full: .venv/demo
	$(BIN)/python -m lcm_jax.train --config=configs/digits.py:full --workdir=$(RUNS)/full
	$(BIN)/python -m lcm_jax.export --workdir=$(RUNS)/full --out=$(RUNS)/full/lcm
	$(BIN)/python -m lcm_jax.evaluate --model=$(RUNS)/full/lcm

test: .venv/test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck --external-sources launch/*.sh

# The teacher: an untrained folder with SD's architecture, then its autoencoder, then its UNet and text encoder.
teacher: .venv/demo
	$(BIN)/python -m lcm_jax.blank --preset=digits --out=$(RUNS)/teacher/blank
	$(BIN)/python -m lcm_jax.train --config=configs/digits_teacher.py:vae --workdir=$(RUNS)/teacher/vae --config.model.folder=$(RUNS)/teacher/blank
	$(BIN)/python -m lcm_jax.export --workdir=$(RUNS)/teacher/vae --out=$(RUNS)/teacher/with_vae --dtype=float16
	$(BIN)/python -m lcm_jax.train --config=configs/digits_teacher.py --workdir=$(RUNS)/teacher/unet --config.model.folder=$(RUNS)/teacher/with_vae
	$(BIN)/python -m lcm_jax.export --workdir=$(RUNS)/teacher/unet --out=$(RUNS)/teacher/digits_teacher --dtype=float16
	$(BIN)/python -m lcm_jax.evaluate --teacher=$(RUNS)/teacher/digits_teacher --out=$(RUNS)/teacher/evaluation

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: PYTHON=python3.12 make $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[demo]'
	@touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[test]'
	@touch $@ .venv/demo

help:
	@sed -n 's/^# \(make\|PYTHON\)/\1/p' Makefile

clean:
	rm -rf .venv .cache runs data

# make train ARGS="--max_iters 100" passes flags on. The first call of a target sets up .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train sample test test-long lint bench notebooks demo pictures clean

train: .venv/ready            ; $(BIN)/python train.py $(NEW) $(ARGS)
sample: .venv/ready           ; $(BIN)/python sample.py $(ARGS)
demo: .venv/ready             ; $(BIN)/python train.py --fresh --minutes 1 --out_dir out-demo $(ARGS) && $(BIN)/python export.py --out_dir out-demo
pictures: .venv/ready-dev     ; PYTHONPATH=.:tests $(BIN)/python docs/pictures.py $(if $(findstring train,$(MAKECMDGOALS)),,$(ARGS))
bench: .venv/ready            ; $(BIN)/python bench.py $(ARGS)
lint: .venv/ready-dev         ; $(BIN)/ruff check . && $(BIN)/ruff format --check .
test: lint                    ; $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)
test-long: .venv/ready-dev    ; $(BIN)/python -m pytest -q -m long $(ARGS)
notebooks: .venv/ready-dev    ; NANOGPT_PLAIN=1 $(BIN)/jupyter execute --inplace gpt_dev.ipynb notebooks/*.ipynb
clean:                        ; rm -rf .venv .pytest_cache .ruff_cache __pycache__ tests/__pycache__

# Three minutes of training, an earlier run moved aside; `make train ARGS=--resume` goes on with one that was stopped.
NEW := $(if $(findstring --resume,$(ARGS)),,--fresh --minutes 3)

.venv/bin/python:             ; $(PYTHON) -m venv .venv
.venv/ready: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt && touch $@
.venv/ready-dev: requirements-dev.txt requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt && touch .venv/ready $@

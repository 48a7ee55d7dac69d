# make train ARGS="--max_iters 100" passes flags on. The first call of a target sets up .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train sample test lint bench notebooks clean

train: .venv/ready            ; $(BIN)/python train.py --fresh $(TRAIN) $(ARGS)
sample: .venv/ready           ; $(BIN)/python sample.py $(ARGS)
bench: .venv/ready            ; $(BIN)/python bench.py $(ARGS)
lint: .venv/ready-dev         ; $(BIN)/ruff check . && $(BIN)/ruff format --check .
test: lint                    ; $(BIN)/python -m pytest -q $(ARGS)
notebooks: .venv/ready-dev    ; $(BIN)/jupyter execute --inplace gpt_dev.ipynb
clean:                        ; rm -rf .venv .pytest_cache .ruff_cache __pycache__ tests/__pycache__

# The model `make train` trains: the best of a few minutes on two CPU cores.
TRAIN := --n_layer 4 --n_head 4 --n_embd 192 --block_size 128 --batch_size 24 --dropout 0 \
         --learning_rate 2e-3 --max_iters 1500 --eval_interval 250

.venv/bin/python:             ; $(PYTHON) -m venv .venv
.venv/ready: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt && touch $@
.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt && touch $@

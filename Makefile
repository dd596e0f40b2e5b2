# Everything works from a clean clone: each target makes the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-out

.PHONY: demo test test-slow lint bench clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed  ## fit, sample and evaluate on handwritten digits; no download
	rm -rf $(DEMO)
	$(BIN)/ebm-prior fit --backbone nvae --ckpt checkpoints/nvae_digits/checkpoint.pt --out $(DEMO)
	$(BIN)/ebm-prior sample --heads $(DEMO) --steps 40 --seeds 0-95 --compare \
		--out $(DEMO)/before-after.png --trajectory $(DEMO)/chain.png
	$(BIN)/ebm-prior evaluate --heads $(DEMO) -n 1500
	@echo "pictures: $(DEMO)/before-after.png, $(DEMO)/chain.png"

test: $(VENV)/installed  ## the default tests
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed  ## the minutes-long tests
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# as the package has it: threads that spin would count as work
bench: export OMP_WAIT_POLICY := PASSIVE
bench: $(VENV)/installed  ## a Langevin step against the published form, scaling, agreement; a quarter of an hour
	$(BIN)/python -m benchmarks.langevin_step
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.memory A B --batch 8
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.peer
	$(BIN)/python -m benchmarks.fast_form tests/fixtures/*/*/
	$(BIN)/python -m benchmarks.parity tests/fixtures/*/*/

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info

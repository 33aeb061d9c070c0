# `make course` opens the course, `make test` runs every test. Each makes or reuses .venv first.
# Arguments for JupyterLab: make course ARGS="--no-browser --ip=0.0.0.0"
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
READY := .venv/.ready

.PHONY: course test export clean

course: $(READY)
	test -f data/scenes.h5 || $(BIN)/maskrcnn-course scenes data/scenes.h5
	$(BIN)/maskrcnn-course lab -- $(ARGS)

test: $(READY)
	$(BIN)/nbdev_test --path nbs --n_workers 2
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

export: $(READY)
	$(BIN)/nbdev_export

# uv is faster; venv and pip do the same
$(READY): settings.ini setup.py pyproject.toml
	if command -v uv >/dev/null 2>&1; then \
	  test -x $(BIN)/python || uv venv --python $(PYTHON) .venv; \
	  uv pip install --python $(BIN)/python -e '.[dev]'; \
	else \
	  test -x $(BIN)/python || $(PYTHON) -m venv .venv; \
	  $(BIN)/python -m pip install -e '.[dev]'; \
	fi
	touch $(READY)

clean:
	rm -rf .venv

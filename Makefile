# Short names for what the documents describe; .ci/run is what CI runs.
.PHONY: test quick lint docs fuzz

python := .venv/bin/python

test:
	bash scripts/test.sh

# Without the tests that take more than about two seconds.
quick:
	bash scripts/test.sh -m "not slow"

# Random inputs, each with a printed seed: property tests; mutated files for every reader
# (FUZZ_INPUTS, FUZZ_SEED); and, where atheris is installed (pip install -e .[fuzz]), inputs that are
# led by what the readers do with them, for FUZZ_SECONDS a reader.
FUZZ_INPUTS ?= 200000
FUZZ_SECONDS ?= 30
fuzz: .venv/.installed-dev
	PYTHONPATH=src:tests FUZZ_INPUTS=$(FUZZ_INPUTS) $(python) -m fuzz.run
	PYTHONPATH=src:tests $(python) -m fuzz.guided --seconds $(FUZZ_SECONDS)
	HYPOTHESIS_PROFILE=fuzz bash scripts/test.sh -m property

lint: .venv/.installed-dev
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(python) scripts/make_docs.py --check

# The pages that are made from the flags' declarations.
docs: .venv/.installed-dev
	$(python) scripts/make_docs.py

.venv/.installed-dev: pyproject.toml constraints.txt
	bash -c 'source scripts/venv.sh && make_venv dev'

# Short names for what the documents describe; .ci/run is what CI runs.
.PHONY: test quick lint docs fuzz

python := .venv/bin/python

test:
	bash scripts/test.sh

# Without the tests that take more than about ten seconds.
quick:
	bash scripts/test.sh -m "not slow"

# Property tests with random inputs and a printed seed.
fuzz:
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

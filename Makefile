# make setup | demo | test | fuzz | lint | types | check | docs | cloud | clean        (see README.md)
.PHONY: setup demo test fuzz lint types check docs cloud clean help
.DEFAULT_GOAL := help
PY := .venv/bin/python

help:  ## what there is
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup:  ## make .venv with everything (quick the second time)
	@.ci/setup

demo: setup  ## tune the default model on pages and compare; PAGES=folder PROBES=file for your own
	@$(PY) benchmarks/demo.py $(if $(PAGES),--pages "$(PAGES)") $(if $(PROBES),--probes "$(PROBES)")

test: setup  ## every test, in two lanes: what needs the Docker engine in one
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

fuzz: setup  ## tries parsers, masks, packing and the server on made-up input; SECONDS=60 in all, SEED=n, TARGETS="html http"
	@PYTHONPATH=tests $(PY) -W error -m fuzz --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED)) $(TARGETS)

lint: setup  ## ruff: rules and format; and whether docs/help.md is what the commands say
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) docs/write_help.py --check

types: setup  ## mypy --strict on the SDK, on localstack/ and on trimtab-xeon
	@$(PY) -m mypy --strict sdk && $(PY) -m mypy --strict localstack && $(PY) -m mypy --strict entrypoints/trimtab_xeon

check: lint types test  ## what CI runs

docs: setup  ## write docs/help.md, the help of every command
	@$(PY) docs/write_help.py

cloud: setup  ## an AWS of this machine: S3 and a SageMaker that runs jobs, until Ctrl-C; OPTIONS="--port 4567 ..."
	@localstack/setup
	@exec $(PY) localstack/cloud.py $(OPTIONS)

clean:  ## remove what was built here, not the model cache
	rm -rf .venv .cloud build dist entrypoints/trimtab_xeon/build .pytest_cache .mypy_cache .ruff_cache

# Every verb first makes sure that .venv holds what it needs; that takes minutes once, and no time after.

PYTHON ?=
EXTRAS  = trainer,dev
SRC     =
OUT     = data
SEED    = 0
ARGS    =
ENGINE  =
CIFAR10 = ../shared/data/cifar10-images.tar.gz
RUN     = runs/cifar10
RESULTS = docs/results/cifar10
run     = .venv/bin/python

.DEFAULT_GOAL = help
.PHONY: help setup demo preprocess test style types cover chaos fuzz docker docker-scale docker-images bench bench-trainer cifar clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## only the set-up of .venv; [PYTHON=python3.12] [EXTRAS=trainer,dev]
	@python=$$(PYTHON="$(PYTHON)" sh tools/find-python.sh) && "$$python" tools/environment.py --extras "$(EXTRAS)"

demo: setup ## the whole path on sample photographs: preprocess, serve, train, evaluate; [SEED=0]
	@exec $(run) -m tools.demo --seed "$(SEED)"  # exec: a signal to make reaches the demo, which ends what it started

preprocess: setup ## images on disk -> data/train.lmdb and data/val.lmdb; [SRC=DIR] [OUT=data]
ifeq ($(SRC),)
	$(run) -m tools.sample_images build/sample-images
endif
	$(run) -m tools.preprocess "$(or $(SRC),build/sample-images)" "$(OUT)"

test: setup ## the tests; [ARGS="-k ledger"]
	@$(run) -m pytest $(ARGS)

style: setup ## the linter and the formatter's check
	@$(run) -m ruff check .
	@$(run) -m ruff format --check .

types: setup ## the type checker, strict
	@$(run) -m mypy

cover: setup ## the tests, and which lines they do not reach
	@$(run) -m pytest --cov --cov-report=term-missing:skip-covered $(ARGS)

chaos: setup ## every kind of failure, caused for four minutes while two clients train; [ARGS="--seed 1"]
	@$(run) -m tools.chaos $(ARGS)

fuzz: setup ## 100,000 damaged messages for the decoders, as many JPEGs, and as many messages for a node; [ARGS="--seed 1"]
	@$(run) -m tools.fuzz $(ARGS)

docker: setup docker-images ## the images, and the demo in containers; [ENGINE=script that starts a Docker engine]
	@$(if $(ENGINE),$(ENGINE) run build/docker) $(run) -m tools.containers demo

docker-scale: setup docker-images ## three loaders in containers: one is killed while they are in use, another is added
	@$(if $(ENGINE),$(ENGINE) run build/docker) $(run) -m tools.containers scale

docker-images: setup ## the images alone
	@$(if $(ENGINE),$(ENGINE) build build/docker) $(run) -m tools.containers build

bench: setup ## this beside the machine's limits and other loaders -> docs/benchmarks.md; [ARGS="--peers none"]
	@$(run) -m tools.bench $(ARGS)

bench-trainer: setup ## the trainer's speed, each switch on and off -> docs/trainer-benchmarks.md; [ARGS="--batch-sizes 128,512"]
	@$(run) -m tools.bench.trainer $(ARGS)

cifar: setup ## CIFAR-10 at full width by the paper's recipe, for a GPU -> docs/results/cifar10; [CIFAR10=FILE] [RUN=DIR] [ARGS=]
	$(run) -m tools.preprocess "$(CIFAR10)" build/cifar10
	$(run) -m trainer run --data build/cifar10 --run "$(RUN)" --resume auto $(ARGS)
	$(run) -m trainer evaluate "$(RUN)" --data build/cifar10 --views ten-crop --classes
	mkdir -p "$(RESULTS)"
	$(run) -m trainer evaluate "$(RUN)" --data build/cifar10 --views ten-crop --json > "$(RESULTS)/ten-crop.json"
	cd "$(RUN)" && cp config.json log.jsonl summary.json *.svg *.png "$(abspath $(RESULTS))"

clean: ## remove what make has made: .venv, build/ and caches; data/ and runs/ stay
	rm -rf .venv build dist *.egg-info loader_service/data/*.so .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
	@echo "data/ and runs/ are yours: they stay."

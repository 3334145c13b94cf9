# Every target first sets up .venv; that takes minutes the first time, and no time afterwards.

PYTHON ?=
EXTRAS  = trainer,report,dev
SRC     =
OUT     = data
SEED    = 0
ARGS    =
ENGINE  =
CIFAR10 = ../shared/data/cifar10-images.tar.gz
RUN     = runs/cifar10
RESULTS = docs/results/cifar10
WHEELS  =
JOBS    = 2
PYTHON_VERSION =
run     = .venv/bin/python
pytest  = $(run) -m pytest --numprocesses=$(JOBS) --dist=worksteal

.DEFAULT_GOAL = help
.PHONY: help setup demo preprocess test test-long examples style types cover chaos soak fuzz sanitize docker docker-scale docker-images bench bench-trainer cifar pictures gpu gpu-wheels clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## set up .venv, which every target does first; [PYTHON=python3.12] [EXTRAS=trainer,report,dev]
	@python=$$(PYTHON="$(PYTHON)" sh tools/find-python.sh) && "$$python" tools/environment.py --extras "$(EXTRAS)"

demo: setup ## run the whole path on sample photographs: preprocess, serve, train, evaluate, report; [SEED=0]
	@exec $(run) -m tools.demo --seed "$(SEED)"  # exec: a signal to make reaches the demo, which ends its processes

preprocess: setup ## convert images on disk to data/train.lmdb and data/val.lmdb; [SRC=DIR] [OUT=data]
ifeq ($(SRC),)
	$(run) -m tools.sample_images build/sample-images
endif
	.venv/bin/loader-service preprocess "$(or $(SRC),build/sample-images)" "$(OUT)"

test: setup ## run the tests, JOBS at a time; [ARGS="-k ledger"] [JOBS=2]
	@$(pytest) $(ARGS)

test-long: setup ## run the tests that take long, as CI does; [ARGS="-k gpu"] [JOBS=2]
	@$(pytest) -m long $(ARGS)

examples: setup ## install other frameworks into build/examples-venv, and run every example in examples/; [ARGS="-k lightning"]
	@$(run) -m tools.examples $(ARGS)

style: setup ## check lint and formatting
	@$(run) -m ruff check .
	@$(run) -m ruff format --check .

types: setup ## check types, strictly
	@$(run) -m mypy

cover: setup ## run the tests; list lines that they do not reach
	@$(run) -m pytest --cov --cov-report=term-missing:skip-covered $(ARGS)

chaos: setup ## inject every kind of failure for three minutes while three clients train; check every batch; [ARGS="--seed 1 --count 1000"]
	@$(run) -m tools.chaos $(ARGS)

soak: setup ## read 200,000 batches, by shared memory and by TCP; fail if memory grows; [ARGS="--batches 20000"]
	@$(run) -m tools.chaos.soak $(ARGS)

fuzz: setup ## 100,000 damaged messages for the decoders, JPEGs, messages for a node; as many guided by coverage; [ARGS="--seed 1"]
	@$(run) -m pip install --quiet --constraint constraints.txt "atheris; platform_machine == 'x86_64'" ziglang
	@$(run) -m tools.fuzz $(ARGS)

sanitize: setup ## the data tests and 100,000 damaged JPEGs with extensions that check every access; [ARGS=--quick]
	@$(run) -m tools.sanitize $(ARGS)

docker: setup docker-images ## build the images and run the demo in containers; [ENGINE=script that starts a Docker engine]
	@$(if $(ENGINE),$(ENGINE) run build/docker) $(run) -m tools.containers demo

docker-scale: setup docker-images ## three loaders in containers: kill one during training, add another
	@$(if $(ENGINE),$(ENGINE) run build/docker) $(run) -m tools.containers scale

docker-images: setup ## build the images only
	@$(if $(ENGINE),$(ENGINE) build build/docker) $(run) -m tools.containers build

bench: setup ## compare with the machine's limits and other loaders -> docs/benchmarks.md; [ARGS="--peers none"]
	@$(run) -m tools.bench $(ARGS)

bench-trainer: setup ## measure the trainer with each option on and off -> docs/trainer-benchmarks.md; [ARGS="--batch-sizes 128,512"]
	@$(run) -m tools.bench.trainer $(ARGS)

cifar: setup ## train CIFAR-10 at full width by the paper's recipe, on a GPU -> docs/results/cifar10; [CIFAR10=FILE] [RUN=DIR] [ARGS=]
	.venv/bin/loader-service preprocess "$(CIFAR10)" build/cifar10
	$(run) -m trainer run --data build/cifar10 --run "$(RUN)" --resume auto $(ARGS)
	$(run) -m trainer evaluate "$(RUN)" --data build/cifar10 --views ten-crop --classes
	mkdir -p "$(RESULTS)"
	$(run) -m trainer evaluate "$(RUN)" --data build/cifar10 --views ten-crop --json > "$(RESULTS)/ten-crop.json"
	$(run) -m trainer report "$(RUN)" --data build/cifar10 --out "$(RESULTS)"
	cd "$(RUN)" && cp config.json log.jsonl summary.json "$(abspath $(RESULTS))"

pictures: setup ## the pictures of README and docs, from a training on the sample photographs -> docs/pictures; [RUN=DIR]
	@$(run) -m tools.docs.pictures $(if $(filter command,$(origin RUN)),--run "$(RUN)")

gpu: $(if $(PYTHON)$(WHEELS),,setup) ## check and measure all that needs a GPU -> docs/gpu.md; [PYTHON=python3] [WHEELS=DIR] [ARGS="--minutes 9"]
	@exec $(if $(PYTHON)$(WHEELS),"$(or $(PYTHON),python3)",$(run)) -m tools.gpu $(if $(WHEELS),--wheels "$(WHEELS)") --cifar10 "$(CIFAR10)" $(ARGS)

gpu-wheels: setup ## download what a GPU machine without a network needs besides PyTorch; [PYTHON_VERSION=3.12] [WHEELS=build/wheels]
	@$(run) -m tools.gpu.wheels --python-version "$(PYTHON_VERSION)" "$(or $(WHEELS),build/wheels)"

clean: ## remove .venv, build/ and caches; keep data/ and runs/
	rm -rf .venv build dist *.egg-info loader_service/data/*.so .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
	@echo "kept: data/ and runs/"

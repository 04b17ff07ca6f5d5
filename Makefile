# Each target sets up what it needs by itself; Python 3.11 or newer and make are enough.
PYTHON ?= python3
BIN := .venv/bin
LOCK := book/requirements.txt
# The stamp is named after what was installed, so that a changed lock, and nothing else, installs again.
INSTALLED := .venv/installed-$(shell cat $(LOCK) pyproject.toml | cksum | cut -d ' ' -f 1)
BOOKFLAGS ?=
BENCHFLAGS ?=
PEERS := sae-lens dictionary-learning eai-sparsify overcomplete
PARITY := sae-bench sae-lens dictionary-learning eai-sparsify

.PHONY: book test stress bench results parity clean

book: $(INSTALLED)  ## execute every chapter and render the book to _build/html; BOOKFLAGS="-W -n --keep-going" makes warnings errors
	$(BIN)/python book/build.py $(BOOKFLAGS)

test: $(INSTALLED)  ## ruff, the unit tests, the doctests, and every chapter at smoke scale
	$(BIN)/ruff check .
	$(BIN)/pytest -n logical --dist worksteal --nbmake --nbmake-timeout=300 sae_lib tests book

stress: $(INSTALLED)  ## what make test does a few times, many times: a training run killed at random moments, damaged checkpoints, variants in two processes
	SAE_LIB_STRESS=1 $(BIN)/pytest --quiet --capture=no -k "many_damaged or again_and_again or test_distributed" tests/test_checkpoint.py tests/test_distributed.py

bench: $(INSTALLED) $(PEERS:%=_build/peers/%/installed)  ## a training step here and in other libraries; BENCHFLAGS="--help" lists options
	PYTHONPATH=tests $(BIN)/python -m peers.bench $(BENCHFLAGS)

parity: $(INSTALLED) $(PARITY:%=_build/peers/%/installed)  ## our metrics and saved SAEs against other libraries', computed anew in their own environments
	PYTHONPATH=tests $(BIN)/python -m peers.parity

results: $(INSTALLED)  ## run what book/experiments.yml describes at pocket scale, a process a core; what is there is not run again
	n=$$(getconf _NPROCESSORS_ONLN); seq $$n | \
	xargs -P $$n -I {} env OMP_NUM_THREADS=1 $(BIN)/python -m sae_lib reproduce all --scale pocket

clean:  ## forget what was built; the installed packages stay
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find _build -mindepth 1 -maxdepth 1 ! -name peers -exec rm -rf {} +

$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "$$(grep '^torch==' $(LOCK))"
	$(BIN)/python -m pip install --requirement $(LOCK)
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	rm -f .venv/installed-*
	touch $@

# One environment a library, each at its newest version with our torch. A torchvision that comes along is made for
# another torch, and importing it fails; none of these libraries needs it to train.
_build/peers/%/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install "$$(grep '^torch==' $(LOCK))"
	$(@D)/bin/python -m pip install --upgrade "$$(grep '^torch==' $(LOCK))" $*
	$(@D)/bin/python -m pip uninstall --yes torchvision
	touch $@

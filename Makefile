# Every target sets up what it needs, in .venv of this checkout, and does nothing twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := requirements/constraints.txt

# What the demonstration and a regenerated matrix are written to; results/ holds the committed ones.
SCRATCH := build

# Of `make gpu`: the folder of its report, and that of the wheels that are carried along.
OUT := $(SCRATCH)/gpu
WHEELS := $(SCRATCH)/wheels

# Of `make matrix`: the defenses; the others, and gdmp-ssim by itself as long as three of these,
# take hours more (DEFENSES=all).
DEFENSES := none,noise-only,oneshot,ddpm,ddim,dpm-solver,diffpure,gdmp,addt
# Of `make certificates`: what is certified, and the radii at which it is attacked, too.
CERTIFIED := dds,smoothing,diffsmooth,densepure
RADII := eps=0.25,0.5,1.0
CERTIFY = $(BIN)/dbp-bench certify --track digits-l2 --sigma 0.25,0.5,1.0 --quiet --out $(SCRATCH)/matrix/results
# What the table of attacks is made of: on these defenses, attacks with hidden and with known draws.
ATTACKED := ddpm,addt
HIDDEN := pgd apgd ensemble-hidden diffattack low-frequency selective square rays spsa stadv transfer \
	autoattack:rand torchattacks:APGD torchattacks:EOTPGD torchattacks:UPGD
KNOWN := pgd apgd ensemble-known rays spsa stadv autoattack:standard $(addprefix torchattacks:,APGD BIM DIFGSM FAB \
	FFGSM FGSM Jitter MIFGSM NIFGSM PGD RFGSM SINIFGSM Square TPGD VMIFGSM VNIFGSM)
BALLS := eps=0.05,0.1,0.3,0.5,1
# Twice the evaluations that the standard attack takes: what they don't change has converged.
TWICE := budget=400
# The standard attack's curve of accuracy against evaluations.
CURVE := budget=20,50,100,400
ANALYSES := immobilise stochasticity eot-curve landscape trajectory efficacy

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format matrix matrix-digits-linf matrix-digits-l2 matrix-analyses \
	certificates attacks leaderboards gpu wheels clean

help:  ## Show the targets.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 22

setup: $(VENV)/.dev  ## Install dbp-bench (editable) and the development tools.

demo: $(VENV)/.core  ## The main job: attack one defense on the embedded digits, on a CPU.
	$(BIN)/dbp-bench run --defense addt --threat dwbox --out $(SCRATCH)/demo

test: $(VENV)/.dev  ## The default tests: CPU, offline, on all cores.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

check: $(VENV)/.dev  ## Format, lint, types, import direction.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## Rewrite files as `make check` wants them.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

matrix: $(VENV)/.core  ## The defenses under every threat model again, on two cores, in build/matrix.
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 matrix-digits-linf matrix-digits-l2 matrix-analyses
	$(BIN)/dbp-bench report --results $(SCRATCH)/matrix/results --out $(SCRATCH)/matrix/leaderboards

matrix-digits-linf matrix-digits-l2: matrix-%:
	@echo '$*: every threat model, a transfer attack, then twice the budget'
	$(BIN)/dbp-bench run --defense $(DEFENSES) --threat all --track $* --quiet --out $(SCRATCH)/matrix/results
	$(BIN)/dbp-bench run --defense $(DEFENSES) --threat eot --attack transfer --track $* --quiet \
		--out $(SCRATCH)/matrix/results
	$(BIN)/dbp-bench sweep $(DEFENSES) --threat all --track $* --over $(TWICE) --black-box none --quiet \
		--out $(SCRATCH)/matrix/results

matrix-analyses:
	for analysis in $(ANALYSES); do \
		$(BIN)/dbp-bench analyze $$analysis --defense $(ATTACKED) --quiet \
			--out $(SCRATCH)/matrix/results || exit 1; \
	done

certificates: $(VENV)/.core  ## Certificates on digits-l2 again (hours on a core), in build/matrix.
	$(CERTIFY) --defense $(CERTIFIED) --n 1000
	$(CERTIFY) --defense dds,smoothing --n 10000
	for votes in 1 3 10; do $(CERTIFY) --defense densepure --n 1000 --set votes=$$votes || exit 1; done
	$(BIN)/dbp-bench run --defense $(CERTIFIED) --threat all --track digits-l2 --quiet \
		--out $(SCRATCH)/matrix/results
	$(BIN)/dbp-bench sweep $(CERTIFIED) --threat eot --track digits-l2 --over $(RADII) --black-box none \
		--quiet --out $(SCRATCH)/matrix/results

attacks: $(VENV)/.third-party  ## Attacks of ours and of third parties again (hours), and their table.
	$(BIN)/dbp-bench run --defense $(ATTACKED) --threat all --out $(SCRATCH)/attacks/results
	for attack in $(HIDDEN); do \
		$(BIN)/dbp-bench run --defense $(ATTACKED) --threat eot --attack $$attack \
			--out $(SCRATCH)/attacks/results || exit 1; \
	done
	for attack in $(KNOWN); do \
		$(BIN)/dbp-bench run --defense $(ATTACKED) --threat dwbox --attack $$attack \
			--out $(SCRATCH)/attacks/results || exit 1; \
	done
	$(BIN)/dbp-bench sweep $(ATTACKED) --threat eot --attack pgd --over eot=1,3,30 --over $(BALLS) \
		--black-box none --examples 120 --out $(SCRATCH)/attacks/results
	$(BIN)/dbp-bench sweep $(ATTACKED) --threat dwbox --attack pgd --over steps=50,100 --over $(BALLS) \
		--black-box none --examples 120 --out $(SCRATCH)/attacks/results
	$(BIN)/dbp-bench sweep $(ATTACKED) --threat eot,dwbox --over $(BALLS) \
		--black-box none --examples 120 --out $(SCRATCH)/attacks/results
	$(BIN)/dbp-bench sweep $(ATTACKED) --threat eot,dwbox --over $(CURVE) \
		--black-box none --out $(SCRATCH)/attacks/results
	$(BIN)/dbp-bench report --results $(SCRATCH)/attacks/results --out $(SCRATCH)/attacks/leaderboards

leaderboards: $(VENV)/.core  ## Write leaderboards/ anew from results/.
	$(BIN)/dbp-bench report --results results --out leaderboards

# No environment is made: it takes $(PYTHON) as it is, and what that lacks from $(WHEELS).
gpu:  ## Everything that a GPU is asked, in under nine minutes: OUT=..., DATA=... (CONTRIBUTING.md).
	PYTHONPATH=benchmark $(PYTHON) -m speed.gpu --out $(OUT) --wheels $(WHEELS) \
		$(if $(DATA),--data $(DATA))

wheels:  ## With a network: the wheels that `make gpu` may need, in build/wheels.
	PYTHONPATH=benchmark $(PYTHON) -m speed.gpu --fetch --wheels $(WHEELS) $(if $(LIGHT),--light)

clean:  ## Remove the environment, caches and scratch results.
	rm -rf $(VENV) $(SCRATCH) dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "dbp-bench needs Python 3.11 to 3.13. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.core: $(VENV)/.pip pyproject.toml $(PINS)
	$(PIP) install --quiet -c $(PINS) -e .
	@touch $@

# torchattacks asks for a requests of 2020: without its dependencies, but for the two that it imports.
$(VENV)/.third-party: $(VENV)/.core
	$(PIP) install --quiet -c $(PINS) -e '.[autoattack]' scipy tqdm
	$(PIP) install --quiet --no-deps torchattacks==3.5.1
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) install --quiet -c $(PINS) --group dev
	@touch $@

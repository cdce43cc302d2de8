# Everything a person does with this repository. `make` alone lists the targets.

.DEFAULT_GOAL := help
.PHONY: help setup build demo test bench kills soak simulate model lint clean

# Debian keeps ip, nft and mke2fs where an ordinary user's PATH does not look.
export PATH := $(PATH):/usr/sbin:/sbin

TARGET := $(or $(CARGO_TARGET_DIR),target)
ARCHITECT := $(TARGET)/debug/architect

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what is missing on this computer (Debian packages; needs root only then)
	@scripts/setup.sh

build: setup ## Build the commands, the preload hook and the guest's static binaries
	@scripts/build.sh

demo: build ## Move a busy Redis machine between two hosts on this computer; ARGS="--help" lists options
	@$(ARCHITECT) demo $(ARGS)

test: build ## Run every test; ends with the capabilities that were missing and the count
	@scripts/test.sh $(ARGS)

bench: build ## Measure against QEMU, nbdkit and others; writes the table of README.md; ONLY=move.gap. or ONLY=silo. measures a part
	@status=0; $(ARCHITECT) bench --only '$(ONLY)' $(ARGS) || status=$$?; \
	$(ARCHITECT) bench-table && exit $$status

kills: build ## Kill, stop and cut at every step of a move, all cases, with a table (minutes)
	@KILLS_ALL=1 cargo nextest run --workspace -E 'package(e2e) & binary(kills)' --no-capture $(ARGS)

MINUTES ?= 5

soak: build ## Random moves, kills, cuts and losses of hosts for MINUTES=5, every write checked; SEED=n plays one again
	@SOAK_MINUTES=$(MINUTES) SEED=$(SEED) cargo test --workspace --test soak -- --nocapture

SEEDS ?= 100000

simulate: ## Try to break the rules of who may run a machine, in SEEDS=100000 histories; SEED=n tells one of them
	@SEEDS=$(SEEDS) cargo test --workspace --lib -- --exact --nocapture \
	migrate::switchover::simulator::hop_check_04_05_06_under_every_seed_the_machine_is_in_one_place_and_comes_to_rest

model: ## Exhaust every history of two attempts to move a machine with three faults, and more (minutes)
	@MODEL=whole cargo test --workspace --lib -- --nocapture --test-threads 1 migrate::switchover::model::

lint: ## Format, lints, licences and sources of dependencies
	@scripts/lint.sh

clean: ## Remove what was built (downloaded Debian packages stay in the user's cache)
	cargo clean

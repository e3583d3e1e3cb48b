# Short ways. `just` without a word lists them.

_list:
    @just --list

# Everything that has to pass.
ci:
    .ci/run

# What answers fast.
check:
    cargo fmt --check
    cargo clippy --workspace --all-targets -- -D warnings
    cargo nextest run -p qmp -p block-core

# All tests, the guest included.
test:
    .ci/setup && cargo nextest run --workspace

# The lock's and the runtime's models, with their canaries.
models:
    RUSTFLAGS='--cfg loom' cargo test -p block-core --test graph_loom --test rt_loom --release --target-dir target/loom

# The figures of docs/performance.md.
bench *args:
    cargo run --release -p trellis-bench -- compare {{args}}

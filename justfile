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
    RUSTFLAGS='--cfg loom' cargo test -p block-core --test graph_loom --test rt_loom --test clusters_loom --test dirty_log_loom --release --target-dir target/loom

# Random schedules over what threads meet at, with their canaries.
schedules:
    RUSTFLAGS='--cfg shuttle' cargo test -p block-core --test schedules --target-dir target/shuttle

# What a request writes, counted: nothing that threads share.
lines:
    RUSTFLAGS='--cfg counted' cargo test -p block-core --test shared_lines --target-dir target/counted

# Licences and sources of all dependencies (`cargo install cargo-deny --locked`).
deny:
    cargo deny check licenses bans sources

# Writes what is generated: manual page, completions, QMP reference.
generate:
    TRELLIS_BLESS=1 cargo test -p trellisd --test generated
    TRELLIS_BLESS=1 cargo test -p trellis-img -p trellis-io --test generated

# The figures of docs/performance.md.
bench *args:
    cargo build --release --bin trellisd --bin trellis-bench
    target/release/trellis-bench compare {{args}}

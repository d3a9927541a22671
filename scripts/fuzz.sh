#!/usr/bin/env bash
# Fuzzes the readers of files, one after the other, and prints how many inputs each was given.
#
#   scripts/fuzz.sh [SECONDS] [TARGET...]      600 seconds and every target unless given
#
# Needs a nightly toolchain, a C++ compiler and cargo-fuzz (`cargo install cargo-fuzz`). An input that
# makes a target fail is kept in fuzz/artifacts/, those that reach new code in fuzz/corpus/.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-600}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(cargo +nightly fuzz list)

cargo +nightly fuzz build
# Files in memory, where there is such a place.
[ -d /dev/shm ] && export TMPDIR=/dev/shm
failed=()
for target in "${targets[@]}"; do
    echo "== $target"
    FUZZ_SEEDS="$PWD/fuzz/corpus/$target" cargo +nightly fuzz run "$target"
    log=$(mktemp)
    cargo +nightly fuzz run "$target" -- -max_total_time="$seconds" -max_len=65536 -timeout=20 \
        -rss_limit_mb=4096 -print_final_stats=1 >"$log" 2>&1 || failed+=("$target")
    grep -E "^stat::|ERROR|panicked|SUMMARY" "$log" || true
    rm -f "$log"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi

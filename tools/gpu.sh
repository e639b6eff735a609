#!/bin/sh
# GPU tests, then GPU measurements, from a bare checkout: nothing is installed, PYTHON's own packages are used. Ends by
# itself within 8 minutes. Rows go to OUT.
set -u
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}" "${OUT:=benchmarks/results}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" DALLE_FAST_TEST_GPU=1

"$PYTHON" - <<'PY' || exit 1
import importlib.util, sys
absent = [name for name in ("torch", "triton", "pytest") if importlib.util.find_spec(name) is None]
if absent:
    sys.exit(f"make gpu: {sys.executable} has no {', '.join(absent)}: name a Python that has, with PYTHON=...")
import torch
if not torch.cuda.is_available():
    sys.exit(f"make gpu: torch {torch.__version__} sees no GPU on this machine; nothing was run.")
print(f"make gpu: torch {torch.__version__}, {torch.cuda.get_device_name()}; at most 8 minutes.", flush=True)
PY

# Only files with GPU tests: others import packages that this Python may not have.
timeout 225 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors \
    $(grep -rl --include="test_*.py" "mark.gpu" tests)
tests=$?
[ "$tests" -eq 5 ] && tests=0 # no test is marked gpu
# What this Python can import, in two runs, of which neither takes the time of the other; last in each what takes longest.
# No case begins later than its run's limit; one that compiles its peers takes up to 40 s.
measure() {
    only=$("$PYTHON" -c '
import sys
from benchmarks import discover
known = discover({})
attention = ("sparse_attention", "sampler")
others = sorted(set(known) - set(attention), key=lambda op: (op == "gumbel_codebook", op))
print(*(f"--only {op}" for op in (attention if sys.argv[1] == "attention" else others) if op in known))' "$1") || return 1
    [ -n "$only" ] || return 0 # without a name everything would be measured
    timeout 115 "$PYTHON" -m benchmarks --device cuda --within 75 --budget 2 --out "$OUT" $only
}
measure attention
attention=$?
measure others
others=$?
for status in "$tests" "$attention" "$others"; do
    [ "$status" -eq 124 ] && echo "make gpu: stopped at its time limit." >&2
    [ "$status" -eq 0 ] || exit "$status"
done

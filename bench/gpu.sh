#!/usr/bin/env bash
# What a GPU is needed for, in one call: the tests that need one, the loss's bench, and a search for block sizes.
# Results go to $OUT if it is set, else to bench/results. Needs torch, Triton and pytest; installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
out=${OUT:-$PWD/bench/results}
failed=0

python -m pytest -q -m gpu -p no:cacheprovider tests 2>&1 | tee "$out/gpu_tests.log" || failed=1
python bench/loss_bench.py --plot "$out/loss_gpu.svg" "$@" || failed=1
for precision in fp16 tf32; do
    python bench/loss_tune.py --dim 128 --precision $precision || failed=1
done
exit $failed

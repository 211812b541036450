#!/usr/bin/env bash
# What a GPU is needed for, in one call: the tests that need one, the benches, and a search for block sizes.
# Results go to $OUT if it is set, else to bench/results. Needs torch, Triton, pytest and hypothesis, and DALI for the
# input's bench; builds the extension if there is none, and installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
out=${OUT:-$PWD/bench/results}
failed=0

python -c 'from simclr_fast.optim import steps; exit(steps.extension() != "cuda")' ||
    SIMCLR_FAST_CUDA=1 python setup.py -q build_ext --inplace || failed=1
python -m pytest -q -m gpu -p no:cacheprovider tests 2>&1 | tee "$out/gpu_tests.log" || failed=1
if command -v compute-sanitizer > /dev/null; then
    compute-sanitizer --error-exitcode 1 python -m pytest -q -m gpu -p no:cacheprovider tests/test_lars.py tests/test_lars_gpu.py -k "not elements" \
        2>&1 | tail -20 | tee "$out/sanitizer.log" || failed=1
fi
python -c 'import matplotlib' 2> /dev/null && plot=--plot || plot=
python bench/lars_bench.py ${plot:+"$plot" "$out/lars_gpu.svg"} || failed=1
python bench/loss_bench.py ${plot:+"$plot" "$out/loss_gpu.svg"} "$@" || failed=1
python bench/augment_bench.py || failed=1
if python -c 'import nvidia.dali' 2> /dev/null; then
    [ -e ../shared/data/photos-256.tar ] && sizes="224 32" || sizes=32
    # shellcheck disable=SC2086 # words
    python bench/data_bench.py --size $sizes ${plot:+"$plot" "$out/data_gpu.svg"} || failed=1
    python bench/data_bench.py --size $sizes --only 'simclr_fast dali' --hardware 0.5 0.65 0.8 0.9 1.0 \
        --workers "$(nproc)" $((($(nproc) + 1) / 2)) || failed=1
fi
for precision in fp16 tf32; do
    python bench/loss_tune.py --dim 128 --precision $precision || failed=1
done
exit $failed

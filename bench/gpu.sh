#!/usr/bin/env bash
# What a GPU is needed for, all of it or one part: bench/gpu.sh [all|tests|kernels|tune|data|step|cifar10]
#
#   tests    those that need a GPU        tune     a search for the loss's block sizes
#   kernels  LARS, loss, views, BatchNorm data     the input
#   step     a training step              cifar10  one run of 100 epochs, with its accuracies
#
# Results go to $OUT if it is set, else to bench/results. Needs torch, Triton, pytest and hypothesis, and DALI for the
# input's bench; builds the extension if there is none, and installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-all}
case $part in
all | tests | kernels | tune | data | step | cifar10) ;;
*) echo "bench/gpu.sh: no part named $part" >&2 && exit 2 ;;
esac
export PYTHONPATH=$PWD
out=${OUT:-$PWD/bench/results}
failed=0

wanted() { [ "$part" = all ] || [ "$part" = "$1" ]; }

python -c 'from simclr_fast.optim import steps; exit(steps.extension() != "cuda")' ||
    SIMCLR_FAST_CUDA=1 python setup.py -q build_ext --inplace || failed=1
python -c 'import matplotlib' 2> /dev/null && plot=--plot || plot=
[ -e ../shared/data/photos-256.tar ] && photos=../shared/data/photos-256.tar || photos=

if wanted tests; then
    python -m pytest -q -m gpu -p no:cacheprovider tests 2>&1 | tee "$out/gpu_tests.log" || failed=1
    if command -v compute-sanitizer > /dev/null; then
        compute-sanitizer --error-exitcode 1 python -m pytest -q -m gpu -p no:cacheprovider tests/test_lars.py tests/test_lars_gpu.py -k "not elements" \
            2>&1 | tail -20 | tee "$out/sanitizer.log" || failed=1
    fi
fi
if wanted kernels; then
    python bench/lars_bench.py ${plot:+"$plot" "$out/lars_gpu.svg"} || failed=1
    python bench/loss_bench.py ${plot:+"$plot" "$out/loss_gpu.svg"} || failed=1
    python bench/augment_bench.py || failed=1
    python bench/batch_norm_bench.py || failed=1
fi
if wanted tune; then
    for precision in fp16 tf32; do
        python bench/loss_tune.py --dim 128 --precision $precision || failed=1
    done
fi
if wanted data && python -c 'import nvidia.dali' 2> /dev/null; then
    sizes="${photos:+224 }32"
    # shellcheck disable=SC2086 # words
    python bench/data_bench.py --size $sizes --seconds 100 ${plot:+"$plot" "$out/data_gpu.svg"} || failed=1
    # shellcheck disable=SC2086 # words
    python bench/data_bench.py --size $sizes --seconds 100 --only 'simclr_fast dali' --hardware 0.5 0.65 0.8 0.9 1.0 \
        --workers "$(nproc)" $((($(nproc) + 1) / 2)) || failed=1
fi
if wanted step; then
    python bench/step_bench.py --compile --largest --seconds 60 ${photos:+--data "$photos"} ${plot:+"$plot" "$out/step_gpu.svg"} || failed=1
    python bench/step_bench.py --arch resnet18 --image-size 32 --batch 512 --compile --seconds 60 || failed=1
fi
if wanted cifar10 && [ -e ../shared/data/cifar10-jpeg.tar.gz ]; then
    python bench/cifar10_record.py --epochs 100 --seeds 1 ${plot:+"$plot" "$out/cifar10_gpu.svg"} || failed=1
fi
exit $failed

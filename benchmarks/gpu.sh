#!/usr/bin/env bash
# What only a GPU can show, in at most 8 minutes: tests of the branches that need one, then speed and peak memory beside
# the original construction, timm, Hugging Face and compiled models, in float32 (TF32 as PyTorch sets it) and bf16.
#
#     benchmarks/gpu.sh FOLDER
#
# Each part has its own time limit. FOLDER keeps what each part wrote until then: gpu.log, tests.xml and one Markdown
# file per suite. The parts that matter most come first.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:?usage: benchmarks/gpu.sh FOLDER}")
mkdir -p "$folder"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4

part() { # NAME SECONDS COMMAND...: run a part for at most so long, with all processes that it starts
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$folder/gpu.log"
    echo "part $name: exit ${PIPESTATUS[0]}, $((SECONDS - start)) of $limit seconds" | tee -a "$folder/gpu.log"
}

suite() { # NAME SECONDS OPTIONS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" python3 benchmarks/run.py --device cuda --processes 1 --suite "$name" "$@" \
        --output "$folder/$name.md"
}

part environment 20 python3 -c '
import torch, torchvision
print(torch.cuda.get_device_name(), torch.__version__, torchvision.__version__, torch.version.cuda)'
part tests 50 python3 -m pytest -q -m cuda tests/test_cuda.py -p no:cacheprovider --durations=5 \
    --junitxml="$folder/tests.xml"
suite table 190 --runs 15
suite plans 60 --runs 15
suite detectors 75 --runs 15
suite compiled 85 --runs 15

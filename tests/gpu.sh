#!/usr/bin/env bash
# What only a GPU can show, in 10 minutes at most: bash tests/gpu.sh 2>&1 | tee gpu.log
# The parts run in this order, each under a limit of its own; one that fails does not end the others.
# 'bash tests/gpu.sh tiny' does the least of each on any device, so that a test can run this script.
# PYTHON: another interpreter. DATA: settings of a data set that is there, instead of drawn images.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python3} work=$(mktemp -d) failed=()
trap 'rm -rf "$work"' EXIT

if [ "${1:-}" = tiny ]; then
    patience=5 # times each limit: what CI's machine does beside this is unknown
    tests=(-k may_mix) compiled=(-k may_mix --collect-only)
    bench=(--backbone resnet18 --crop 33 --size 36 48 --batch 2 --images 2 --workers 1 --threads 1
        --precision fp32)
    stages=(--pairs 1 --only select)
    drawn="8, 4, 4, 1, size=(36, 48)"
    train=(model.backbone=resnet18 device=cpu workers=1 augment.crop_size=33 augment.base_size=48
        supervised.iterations=2 retrain.iterations=2 supervised.batch_size=2 retrain.batch_size=2
        'pseudo_label={scales: [1.0], neighbour_scales: [1.0], flip: false}')
else
    patience=1
    tests=(-k "not compile") compiled=(-k compile)
    bench=(--backbone resnet50 --batch 16 --images 256 --workers 12)
    stages=(--pairs 2)
    drawn="400, 64, 64, 8, size=(375, 500)"
    train=(workers=12 supervised.iterations=60 retrain.iterations=60)
fi

part() { # title, seconds at most, command ...
    local title=$1 limit=$(($2 * patience)) start=$SECONDS code
    shift 2
    printf '\n== %s, %s s at most: %s\n' "$title" "$limit" "$*"
    timeout --kill-after=5 "$limit" "$@"
    code=$?
    printf -- '-- %s: exit code %s after %s s\n' "$title" "$code" $((SECONDS - start))
    [ "$code" = 0 ] || failed+=("$title")
}

# Images a second of every stage of a run, with reading, writing and validation in them.
speeds='
import json, sys
from pathlib import Path
for file in sorted(Path(sys.argv[1]).glob("*/stage.json")):
    stage = json.loads(file.read_text())
    crops = sum(stage.get(key, 0) for key in ("labeled_crops", "unlabeled_crops"))
    images, seconds = crops or stage.get("images", 0), stage["seconds"]
    print(f"{file.parent.name}: {images} images in {seconds:.1f} s, {images / seconds:.2f} a second")
'
draw="
import sys
from pathlib import Path
from dataset.catalog import KINDS
from dataset.demo.writing import Scenes, write_demo
write_demo(Path(sys.argv[1]), KINDS['demo'].palette(), Scenes($drawn))
"
data=(${DATA:-dataset.kind=demo dataset.root=$work/data dataset.split=null})

part "tests" 190 "$python" -m pytest tests/test_cuda.py --tb=short -x -q -p no:cacheprovider "${tests[@]}"
part "the compiled step" 110 "$python" -m pytest tests/test_cuda.py --tb=short -q -p no:cacheprovider "${compiled[@]}"
part "stages beside their plain forms" 120 "$python" tests/benchmarks/stages.py "${bench[@]}" "${stages[@]}"
part "images drawn" 40 "$python" -c "$draw" "$work/data"
part "the stages of pascal.yaml" 90 "$python" train.py --config pascal.yaml "${data[@]}" \
    name=gpu "outdir=$work" model.pretrained=null evaluate.every=1000 tensorboard=false panels.images=0 "${train[@]}"
part "their speed" 5 "$python" -c "$speeds" "$work/gpu"
part "where labeling, selection and evaluation spend their time" 45 \
    "$python" tests/benchmarks/inference.py "${bench[@]}"
printf '\n%s parts failed after %s s%s\n' "${#failed[@]}" "$SECONDS" "${failed[*]:+: ${failed[*]}}"
exit "${#failed[@]}"

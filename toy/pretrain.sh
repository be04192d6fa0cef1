#!/usr/bin/env bash
# Trains every model of toy/models from nothing:     bash toy/pretrain.sh [OUT]
# OUT is runs/models; a model that is there already is skipped, so the same command continues after a kill.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/models}
mkdir -p "$out"
export GOMP_SPINCOUNT=10000    # threads that spin for longer while they wait slow a busy machine down

python toy/pretrain_editor.py --out "$out"          # editor_weak, editor
python toy/pretrain.py --out "$out"                 # vlm_small, vlm, teacher
python toy/pretrain_judge.py --out "$out"           # judge
python toy/pretrain_direct.py --out "$out"          # direct
python toy/pretrain_qwen.py --out "$out"            # editor_qwen

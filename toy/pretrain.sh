#!/usr/bin/env bash
# Trains every model of toy/models from nothing:     bash toy/pretrain.sh [OUT]
# OUT is runs/models; a model that is there already is skipped, so the same command continues after a kill.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/models}
mkdir -p "$out/logs"
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
export OMP_NUM_THREADS=1

one_ends() {   # wait for one of those in the background
    wait -n || { tail -n 5 "$out"/logs/*.log >&2; exit 1; }
}
begin() {      # NAME COMMAND: in the background, on one core, at most two at a time; its output goes into a log
    while [ "$(jobs -pr | wc -l)" -ge 2 ]; do one_ends; done
    echo "minute $((SECONDS / 60)): $out/logs/$1.log"
    "${@:2}" --out "$out" > "$out/logs/$1.log" 2>&1 &
}
need() {       # NAME: wait until this model is there
    until [ -e "$out/$1" ]; do one_ends; done
}

begin editor python toy/pretrain_editor.py             # editor_weak, too
begin editor_qwen python toy/pretrain_qwen.py
need editor
begin vlm python toy/pretrain.py --models vlm
begin judge python toy/pretrain_judge.py
begin vlm_small python toy/pretrain.py --models vlm_small
need vlm
begin teacher python toy/pretrain.py --models teacher
begin direct python toy/pretrain_direct.py
for name in editor_qwen judge vlm_small teacher direct; do need $name; done
wait                                                   # each still looks at what its model has learned
echo "minute $((SECONDS / 60)): all models are in $out"

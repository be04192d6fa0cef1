#!/usr/bin/env bash
# The paper's Table 3 in miniature: which reward makes the better editor?
#     bash toy/table3.sh [RUN [SEEDS]]        RUN (runs/toy) is what toy/run.sh wrote; SEEDS "0 1 2"
# What is done is not done again, so the same command continues after a kill. Two seeds at a time:
#     export OMP_NUM_THREADS=1; bash toy/table3.sh runs/toy ""
#     bash toy/table3.sh runs/toy 0 & bash toy/table3.sh runs/toy 1 & wait
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/toy}
out=$run/table3
data=$run/data
models=toy/models
export GOMP_SPINCOUNT=10000

guide=        # flags for everything that draws
score() {     # FOLDER EDITOR [--lora LORA]: the held-out edits of an editor, by the oracle
    [ -e "$1/scores.jsonl" ] && return
    python build_sft.py --toy --principles $data/editor_bench/edits.jsonl --editors "$2" --num_images_per_prompt 1 \
        "${@:3}" $guide --out "$1"
    python toy/world.py judge --edits "$1/candidates.jsonl" --out "$1/scores.jsonl"
}

row() {       # NAME EDITOR REWARD [flags]: Flow-GRPO, with half as many prompts a step as in run.sh
    here=$out/$1/$seed
    [ -e "$here/scores.jsonl" ] && return
    python train_flow_grpo.py --toy --prompts $data/rl/principles.jsonl --editor "$2" --reward "$3" \
        --prompts_per_step 8 --seed $seed --out "$here/flow" --resume "${@:4}" $guide
    python toy/world.py curve --samples "$here/flow/samples" --out "$here/curve.jsonl"
    score "$here" "$2" --lora "$here/flow/lora"
}

# The small verifier: the same rows and pairs, half the weights. A run that is complete only saves again.
python train_sft.py --toy --data $data/sft/sft.jsonl --model $models/vlm_small --out $out/small_sft --resume
python train_gcpo.py --toy --pairs $data/preferences/preferences.jsonl --model $out/small_sft/model --out $out/small_rl --resume

for editor in editor editor_weak editor_qwen; do
    score $out/$editor $models/$editor
done
guide="--guidance_scale 1" score $out/editor_qwen_unguided $models/editor_qwen
for seed in ${2-0 1 2}; do
    row rl $models/editor $run/gcpo/model
    row sft $models/editor $run/sft/model
    row weak $models/editor_weak $run/gcpo/model
    row qwen $models/editor_qwen $run/gcpo/model --prompts_per_step 16
    guide="--guidance_scale 1" row unguided $models/editor_qwen $run/gcpo/model
    row teacher $models/editor $models/teacher
    row small_sft $models/editor $out/small_sft/model
    row small_rl $models/editor $out/small_rl/model
    row hacked $models/editor $models/vlm --beta 0        # it scores by chance: reward up, truth down
done
python toy/table3.py --out $out

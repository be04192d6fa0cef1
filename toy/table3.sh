#!/usr/bin/env bash
# The paper's Table 3 in miniature: which reward makes the better editor?
#     bash toy/table3.sh [RUN [RUNS]]         RUN (runs/toy) is what toy/run.sh wrote; RUNS "0 1 2"
# Run 0 has the reward models of RUN; each other run trains its own, from the cold start on, with its number as the seed.
# What is done is not done again, so the same command continues after a kill. Two runs at a time:
#     export OMP_NUM_THREADS=1; bash toy/table3.sh runs/toy 0; bash toy/table3.sh runs/toy 1 & bash toy/table3.sh runs/toy 2 & wait
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/toy}
out=$run/table3
data=$run/data
models=toy/models
export GOMP_SPINCOUNT=10000

score() {     # FOLDER EDITOR [--lora LORA]: the held-out edits of an editor with 1 to 28 denoising steps, by the oracle
    for steps in 1 2 6 28; do
        [ -e "$1/steps$steps/scores.jsonl" ] && continue
        python build_sft.py --toy --principles $data/editor_bench/edits.jsonl --editors "$2" --num_images_per_prompt 1 \
            --num_inference_steps $steps "${@:3}" --out "$1/steps$steps"
        python toy/world.py judge --edits "$1/steps$steps/candidates.jsonl" --out "$1/steps$steps/scores.jsonl"
    done
}

row() {       # NAME EDITOR REWARD [flags]: Flow-GRPO, and what it has made of the editor
    here=$out/$1/$seed
    [ -e "$here/steps28/scores.jsonl" ] && return
    python train_flow_grpo.py --toy --prompts $data/rl/principles.jsonl --editor "$2" --reward "$3" \
        --seed $seed --out "$here/flow" --resume "${@:4}"
    python toy/world.py curve --samples "$here/flow/samples" --out "$here/curve.jsonl"
    score "$here" "$2" --lora "$here/flow/lora"
}

reward_model() {      # NAME BASE: a cold start and GCPO in OUT/NAME_sft and OUT/NAME_rl. A run that is complete only saves again.
    python train_sft.py --toy --data $data/sft/sft.jsonl --model $models/$2 --seed $seed --out $out/$1_sft --resume
    python train_gcpo.py --toy --pairs $data/preferences/preferences.jsonl --model $out/$1_sft/model --seed $seed \
        --out $out/$1_rl --resume
}

for editor in editor editor_qwen; do
    score $out/$editor $models/$editor
done
for seed in ${2-0 1 2}; do
    sft=$run/sft/model rl=$run/gcpo/model
    if [ $seed != 0 ]; then
        reward_model models/$seed vlm
        sft=$out/models/${seed}_sft/model rl=$out/models/${seed}_rl/model
    fi
    reward_model models/${seed}_small vlm_small
    row rl $models/editor $rl
    row sft $models/editor $sft
    row small_rl $models/editor $out/models/${seed}_small_rl/model
    row small_sft $models/editor $out/models/${seed}_small_sft/model
    row qwen $models/editor_qwen $rl
    if [ $seed = 0 ]; then
        row teacher $models/editor $models/teacher
        row base $models/editor $models/vlm --beta 0          # it scores by chance
    fi
done
python toy/table3.py --out $out

#!/usr/bin/env bash
# The whole paper in miniature, every stage as you would run it yourself:   bash toy/run.sh [OUT]
# Without a GPU, on two quiet cores, it takes 10 to 13 minutes. OUT (runs/toy) is deleted first.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/toy}
data=$out/data
models=toy/models
rm -rf "$out"
mkdir -p "$out/logs"
export GOMP_SPINCOUNT=10000    # threads that spin for longer while they wait slow a busy machine down

# PERCENT, the first word of each command below, is how much of the whole run lies behind it.
say() {
    left=
    [ "$1" -lt 10 ] || left=", about $((SECONDS * (100 - $1) / $1 / 60 + 1)) left"
    printf '\n\033[1m$ %s\033[0m   (minute %d%s)\n' "${*:2}" $((SECONDS / 60)) "$left" >&2        # not into a log
}
run() {        # PERCENT COMMAND
    say "$@"
    "${@:2}"
}
begin() {      # PERCENT COMMAND: in the background, on one core, at most two at a time; its output goes into a log
    if [ $running -eq 2 ]; then wait -n; running=1; fi
    say "$@"
    num_logs=$((num_logs + 1)) running=$((running + 1))
    OMP_NUM_THREADS=1 "${@:2}" > "$out/logs/$num_logs.log" 2>&1 || { tail "$out/logs/$num_logs.log" >&2; exit 1; } &
}
finish() {     # wait for all that was begun
    while [ $running -gt 0 ]; do wait -n; running=$((running - 1)); done
}
running=0 num_logs=0

run 0 python toy/world.py edits --out $data

# Stage 1: instructions become principles.
for split in sft preferences reward_bench rl; do
    begin 1 python decompose.py --toy --edits $data/$split/edits.jsonl --vlm $models/teacher --out $data/$split/principles.jsonl
done
finish

# Stage 2: two editors, a lenient judge, a careful inspector.
begin 5 python build_sft.py --toy --principles $data/sft/principles.jsonl --editors $models/editor $models/editor_weak \
    --pool $models/teacher --inspector $models/teacher --out $data/sft

# Human preferences: pairs of edits for GCPO, and held-out pairs that measure every reward model.
for split in preferences reward_bench; do
    begin 5 python build_sft.py --toy --principles $data/$split/principles.jsonl --editors $models/editor $models/editor_weak --out $data/$split
done
finish
for split in preferences reward_bench; do
    run 16 python toy/world.py prefer --candidates $data/$split/candidates.jsonl --out $data/$split/preferences.jsonl
done

# Stage 3: the cold start.
run 17 python train_sft.py --toy --data $data/sft/sft.jsonl --model $models/vlm --out $out/sft

# Stage 4: GCPO.
run 27 python train_gcpo.py --toy --pairs $data/preferences/preferences.jsonl --model $out/sft/model --out $out/gcpo

# Stage 6, first half: how often does each reward model agree with people? One sampled verdict per edit, as GCPO trains it.
begin 59 python evaluate.py reward --toy --temperature 1 --pairs $data/reward_bench/preferences.jsonl --vlm $models/vlm --out $out/reward/base
begin 59 python evaluate.py reward --toy --temperature 1 --pairs $data/reward_bench/preferences.jsonl --vlm $out/sft/model --out $out/reward/sft
begin 59 python evaluate.py reward --toy --temperature 1 --pairs $data/reward_bench/preferences.jsonl --vlm $out/gcpo/model --out $out/reward/rl

# How well does each reward follow the truth, within groups of the editor's own samples?
head -n 100 $data/rl/principles.jsonl > $data/rl/first100.jsonl
begin 61 python build_sft.py --toy --principles $data/rl/first100.jsonl --editors $models/editor --num_images_per_prompt 4 \
    --pool $out/sft/model $out/gcpo/model --temperatures 0 --out $out/trust
finish
run 67 python toy/world.py trust --traces $out/trust/traces.jsonl

# Stage 5: Flow-GRPO. The RL-RRM is the only reward.
run 67 python train_flow_grpo.py --toy --prompts $data/rl/principles.jsonl --editor $models/editor --reward $out/gcpo/model --out $out/flow

# Stage 6, second half: three editors draw with the same noise, the last with the LoRA of stage 5. Two judges rate them: a VLM, as in the paper, and the oracle.
begin 91 python build_sft.py --toy --principles $data/editor_bench/edits.jsonl --editors $models/editor_weak --num_images_per_prompt 1 --out $out/editor/weak
begin 91 python build_sft.py --toy --principles $data/editor_bench/edits.jsonl --editors $models/editor --num_images_per_prompt 1 --out $out/editor/before
begin 91 python build_sft.py --toy --principles $data/editor_bench/edits.jsonl --editors $models/editor --num_images_per_prompt 1 --lora $out/flow/lora --out $out/editor/after
finish
for editor in weak before after; do
    begin 93 python evaluate.py judge --toy --edits $out/editor/$editor/candidates.jsonl --vlm $models/judge --out $out/judged/$editor
    begin 93 python toy/world.py judge --edits $out/editor/$editor/candidates.jsonl --out $out/editor/$editor/scores.jsonl
done
finish

# The reports are long: they go into files, and the last lines of this run have the main numbers.
begin 97 python evaluate.py report --scores weak=$out/judged/weak/scores.jsonl before=$out/judged/before/scores.jsonl \
    after=$out/judged/after/scores.jsonl --out $out/judged/report
begin 97 python evaluate.py report --scores base=$out/reward/base/scores.jsonl sft=$out/reward/sft/scores.jsonl rl=$out/reward/rl/scores.jsonl \
    weak=$out/editor/weak/scores.jsonl before=$out/editor/before/scores.jsonl after=$out/editor/after/scores.jsonl --out $out/report
begin 97 python toy/world.py curve --samples $out/flow/samples --out $out/flow/oracle.jsonl
finish
run 98 python toy/journey.py --run $out --out $out/journey
run 99 python toy/summary.py --out $out --minutes $((SECONDS / 60)).$((SECONDS % 60 * 10 / 60))

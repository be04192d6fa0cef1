#!/usr/bin/env bash
# The whole paper in miniature, every stage as you would run it yourself:   bash toy/run.sh [OUT]
# With no GPU and two cores it takes about 17 minutes. OUT (runs/toy) is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/toy}
data=$out/data
models=toy/models
rm -rf "$out"
export GOMP_SPINCOUNT=10000    # threads that spin for longer while they wait slow a busy machine down

run() {
    printf '\n\033[1m$ %s\033[0m   (minute %d)\n' "$*" $((SECONDS / 60))
    "$@"
}

run python toy/world.py edits --out $data

# Stage 1: instructions become principles.
for split in sft preferences reward_bench rl; do
    run python decompose.py --toy --edits $data/$split/edits.jsonl --vlm $models/teacher --out $data/$split/principles.jsonl
done

# Stage 2: two editors, a lenient judge, a careful inspector.
run python build_sft.py --toy --principles $data/sft/principles.jsonl --editors $models/editor $models/editor_weak \
    --pool $models/teacher --inspector $models/teacher --out $data/sft

# Stage 3: the cold start.
run python train_sft.py --toy --data $data/sft/sft.jsonl --model $models/vlm --out $out/sft

# Human preferences: pairs of edits for GCPO, and held-out ones that measure every reward model.
for split in preferences reward_bench; do
    run python build_sft.py --toy --principles $data/$split/principles.jsonl --editors $models/editor $models/editor_weak --out $data/$split
    run python toy/world.py prefer --candidates $data/$split/candidates.jsonl --out $data/$split/preferences.jsonl
done

# Stage 4: GCPO.
run python train_gcpo.py --toy --pairs $data/preferences/preferences.jsonl --model $out/sft/model --out $out/gcpo

# Stage 6, first half: how often does each judge agree with people? One sampled verdict per edit, as GCPO trains it.
for judge in base:$models/vlm sft:$out/sft/model rl:$out/gcpo/model; do
    run python evaluate.py reward --toy --temperature 1 --pairs $data/reward_bench/preferences.jsonl --vlm ${judge#*:} --out $out/reward/${judge%%:*}
done

# How good a reward is it? Its score against the truth, within groups of the editor's own samples.
run python build_sft.py --toy --principles $data/rl/principles.jsonl --editors $models/editor --seeds 4 \
    --pool $out/sft/model $out/gcpo/model --temperatures 0 --out $out/trust
run python toy/world.py trust --traces $out/trust/traces.jsonl

# Stage 5: Flow-GRPO; the RL-RRM is the only reward.
run python train_flow_grpo.py --toy --prompts $data/rl/principles.jsonl --editor $models/editor --reward $out/gcpo/model --out $out/flow

# Stage 6, second half: three editors, and two judges of them: a VLM, as in the paper, and the oracle, which no stage knows.
run python evaluate.py edit --toy --prompts $data/editor_bench/edits.jsonl --editor $models/editor_weak --out $out/editor/weak
run python evaluate.py edit --toy --prompts $data/editor_bench/edits.jsonl --editor $models/editor --out $out/editor/before
run python evaluate.py edit --toy --prompts $data/editor_bench/edits.jsonl --editor $models/editor --lora $out/flow/lora --out $out/editor/after
for editor in weak before after; do
    run python evaluate.py judge --toy --edits $out/editor/$editor/edits.jsonl --vlm $models/judge --out $out/judged/$editor
    run python toy/world.py judge --edits $out/editor/$editor/edits.jsonl --out $out/editor/$editor/scores.jsonl
done
run python toy/world.py curve --samples $out/flow/samples --out $out/flow/oracle.jsonl
run python evaluate.py report --scores weak=$out/judged/weak/scores.jsonl before=$out/judged/before/scores.jsonl \
    after=$out/judged/after/scores.jsonl --pictures --out $out/judged/report
run python evaluate.py report --scores base=$out/reward/base/scores.jsonl sft=$out/reward/sft/scores.jsonl rl=$out/reward/rl/scores.jsonl \
    weak=$out/editor/weak/scores.jsonl before=$out/editor/before/scores.jsonl after=$out/editor/after/scores.jsonl \
    --metrics $out/gcpo/metrics.jsonl $out/flow/metrics.jsonl $out/flow/oracle.jsonl --out $out/report
run python toy/summary.py --out $out --minutes $((SECONDS / 60)).$((SECONDS % 60 * 10 / 60))

#!/usr/bin/env bash
# The whole paper in miniature, every stage as you would run it yourself:   bash toy/run.sh [OUT]
# Without a GPU, on two cores, it takes about 17 minutes. OUT (runs/toy) is deleted first.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/toy}
data=$out/data
models=toy/models
rm -rf "$out"
export GOMP_SPINCOUNT=10000    # threads that spin for longer while they wait slow a busy machine down

run() {
    printf '\n\033[1m$ %s\033[0m   (minute %d)\n' "$*" $((SECONDS / 60)) >&2        # not into a log
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

# Human preferences: pairs of edits for GCPO, and held-out pairs that measure every reward model.
for split in preferences reward_bench; do
    run python build_sft.py --toy --principles $data/$split/principles.jsonl --editors $models/editor $models/editor_weak --out $data/$split
    run python toy/world.py prefer --candidates $data/$split/candidates.jsonl --out $data/$split/preferences.jsonl
done

# Stage 4: GCPO.
run python train_gcpo.py --toy --pairs $data/preferences/preferences.jsonl --model $out/sft/model --out $out/gcpo

# Stage 6, first half: how often does each reward model agree with people? One sampled verdict per edit, as GCPO trains it.
run python evaluate.py reward --toy --temperature 1 --pairs $data/reward_bench/preferences.jsonl --vlm $models/vlm --out $out/reward/base
run python evaluate.py reward --toy --temperature 1 --pairs $data/reward_bench/preferences.jsonl --vlm $out/sft/model --out $out/reward/sft
run python evaluate.py reward --toy --temperature 1 --pairs $data/reward_bench/preferences.jsonl --vlm $out/gcpo/model --out $out/reward/rl

# How well does each reward follow the truth, within groups of the editor's own samples?
run python build_sft.py --toy --principles $data/rl/principles.jsonl --editors $models/editor --num_images_per_prompt 4 \
    --pool $out/sft/model $out/gcpo/model --temperatures 0 --out $out/trust
run python toy/world.py trust --traces $out/trust/traces.jsonl

# Stage 5: Flow-GRPO. The RL-RRM is the only reward.
run python train_flow_grpo.py --toy --prompts $data/rl/principles.jsonl --editor $models/editor --reward $out/gcpo/model --out $out/flow

# Stage 6, second half: three editors draw with the same noise, the last with the LoRA of stage 5. Two judges rate them: a VLM, as in the paper, and the oracle.
run python build_sft.py --toy --principles $data/editor_bench/edits.jsonl --editors $models/editor_weak --num_images_per_prompt 1 --out $out/editor/weak
run python build_sft.py --toy --principles $data/editor_bench/edits.jsonl --editors $models/editor --num_images_per_prompt 1 --out $out/editor/before
run python build_sft.py --toy --principles $data/editor_bench/edits.jsonl --editors $models/editor --num_images_per_prompt 1 --lora $out/flow/lora --out $out/editor/after
for editor in weak before after; do
    run python evaluate.py judge --toy --edits $out/editor/$editor/candidates.jsonl --vlm $models/judge --out $out/judged/$editor
    run python toy/world.py judge --edits $out/editor/$editor/candidates.jsonl --out $out/editor/$editor/scores.jsonl
done

# The reports are long: they go into files, and the last lines of this run have the main numbers.
run python evaluate.py report --scores weak=$out/judged/weak/scores.jsonl before=$out/judged/before/scores.jsonl \
    after=$out/judged/after/scores.jsonl --out $out/judged/report > $out/judged.log
run python evaluate.py report --scores base=$out/reward/base/scores.jsonl sft=$out/reward/sft/scores.jsonl rl=$out/reward/rl/scores.jsonl \
    weak=$out/editor/weak/scores.jsonl before=$out/editor/before/scores.jsonl after=$out/editor/after/scores.jsonl --out $out/report > $out/report.log
run python toy/world.py curve --samples $out/flow/samples --out $out/flow/oracle.jsonl
run python toy/journey.py --run $out --out $out/journey
run python toy/summary.py --out $out --minutes $((SECONDS / 60)).$((SECONDS % 60 * 10 / 60))

"""Train the toy's judge: the VLM that marks an editor's pictures in stage 6 (evaluate.py judge).

In the paper this is a large model that has nothing to do with the reward. Here it starts from
toy/models/vlm, knows the edits of the two editors, and learns evaluate.py's own prompts: success
and restraint of an edit, naturalness and cleanliness of a picture, true as the oracle reads them.
What it sees it says first, place by place. It has seen no edit of an editor that Flow-GRPO has
changed.

    python toy/pretrain_judge.py --out toy/models      # after toy/pretrain.py
"""
import argparse
import random
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import build_sft            # noqa: E402
import evaluate             # noqa: E402
import pretrain as P        # noqa: E402
import world as W           # noqa: E402

FIXED = [evaluate.SC_RULES, evaluate.PQ_RULES, '{"success": ', ', "restraint": ',
         '{"naturalness": ', ', "cleanliness": ', ", then", ", now", "Asked:", ". Kept:",
         "0.0", "5.0", "10.0"]


def change_marks(rng, row, found):
    """What was where, what should be there, what is there now; what is done and kept; the marks."""
    (scene, instruction, target), shown = row, found["shown"]
    names = [" background", *(f" {place}:" for place in W.PLACES)]
    things = [[[*W.BACKGROUNDS][s[0]], *map(P.thing, s[1:])] for s in (scene, target, shown)]
    lines = [f"{name} {was}, then {wanted}, now {is_now}{' yes' if is_now == wanted else ' no'}\n"
             for name, was, wanted, is_now in zip(names, *things)]
    categories = [p["category"] for p in W.principles(scene, target)]
    asked, kept = ("".join(" yes" if v else " no" for c, v in zip(categories, found["verdict"])
                           if c == name) for name in ("follow", "keep"))
    follow, keep = W.follow_and_keep(categories, found["verdict"])
    marks = f'{{"success": {10 * follow:.1f}, "restraint": {10 * keep:.1f}}}'
    return (evaluate.judge_chats(*P.PICTURES, instruction)[0],
            f"Seen:{''.join(lines)}Asked:{asked}. Kept:{kept}.\n{marks}")


def picture_marks(rng, row, found):
    """The edit alone: what it shows, clean or smudged; then the same mark twice."""
    seen, mark = P.describe(found["shown"], "edited", found["clean"]), found["PQ"]
    return (evaluate.judge_chats(*P.PICTURES, row[1])[1],
            f'{seen}{{"naturalness": {mark:.1f}, "cleanliness": {mark:.1f}}}')


def compare_marks(folder, pool, n=400):
    """Greedy marks on `n` held-out edits, beside the oracle's."""
    ask = build_sft.connect(folder, torch.device(P.DEVICE))
    rows, sources, edits = [part[:n] for part in pool]
    found = W.oracle(edits, [r[0] for r in rows], [r[2] for r in rows])
    chats = [evaluate.judge_chats(W.to_pil(s), W.to_pil(e), r[1])
             for r, s, e in zip(rows, sources, edits)]
    read, names_of = [], (("success", "restraint"), ("naturalness", "cleanliness"))
    for asked, names in zip(zip(*chats), names_of):
        replies = [t for i in range(0, n, 100) for t in ask(asked[i:i + 100], 128, 0, 0)]
        marks = [evaluate.parse_marks(text, names) for text in replies]
        read.append([known and known.values() for known in marks])
    scores = [evaluate.edit_scores(*marks) for marks in zip(*read)]
    for name in ("SC", "PQ", "O"):
        known = [(s[name], f[name]) for s, f in zip(scores, found) if s[name] is not None]
        said, true = torch.tensor(known).view(-1, 2).unbind(1)
        print(f"{name}: {len(known)}/{n} read, mean {said.mean():.2f} (oracle {true.mean():.2f}), "
              f"within 0.5 of the oracle's: {((said - true).abs() <= 0.5).float().mean():.3f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="toy/models", help="holds vlm, editor and editor_weak")
    parser.add_argument("--steps", type=int, default=2500)
    args = parser.parse_args()
    torch.manual_seed(0)
    tok = AutoTokenizer.from_pretrained(f"{args.out}/vlm")
    tok.add_tokens([AddedToken(text, special=False, normalized=False) for text in FIXED])
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        f"{args.out}/vlm", dtype=torch.float32, attn_implementation="sdpa")
    model.resize_token_embeddings(len(tok))
    editors = [f"{args.out}/{name}" for name in ("editor_weak", "editor")]
    pool = P.editor_pool(editors, 2500, 1)
    tasks = {change_marks: 0.8, picture_marks: 0.2}
    P.train_language(model.to(P.DEVICE), tok, args.steps, 1.5e-3, 48, tasks, random.Random(0), pool,
                     "judge")
    P.save(model, tok, "vlm", f"{args.out}/judge")
    compare_marks(f"{args.out}/judge", P.editor_pool(editors, 200, 1, name=1))


if __name__ == "__main__":
    main()

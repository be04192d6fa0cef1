"""Train the toy's direct scorer: a VLM that names a digit from 0 to 5 at once, and nothing else.

It stands for a large untrained VLM that is asked for a rating, as UniWorld-V2 does, and EditReward
starts from it: a model that has learned to judge in a single pass. It begins as toy/models/vlm, and
learns from made-up edits and from the weak editor's. Its labels are half of the oracle's SC with an
error (a standard deviation of 0.7), rounded. So it knows whether an edit was carried out, and lets
every smudge pass, as the toy's teacher does; what people prefer, it has not been told.

    python toy/pretrain_direct.py --out runs/models
"""
import argparse
import random
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "toy"), str(ROOT / "related")]
import pretrain as P        # noqa: E402
import train_nft            # noqa: E402
import world as W           # noqa: E402

ERROR = 0.7                 # standard deviation of a rating, in digits


def rating(rng, row, found):
    """The prompt of train_nft.py, and a digit."""
    digit = min(5, max(0, round(found["SC"] / 2 + rng.gauss(0, ERROR))))
    return train_nft.rating_chat(*P.PICTURES, row[1]), str(digit)


def compare_ratings(folder, pool, n=400):
    """The correlation of the expected digit with the oracle's marks on `n` held-out edits."""
    vlm = train_nft.VLM(folder, "", torch.device(P.DEVICE))
    rows, sources, edits = pool
    scores = []
    for row, source, edit in zip(rows[:n], sources, edits):
        chat = train_nft.rating_chat(W.to_pil(source), W.to_pil(edit), row[1])
        logits = train_nft.digit_logits(vlm, [chat], [""], 6)
        scores.append(train_nft.expected_value(logits.cpu(), torch.arange(6)).item())
    found = W.oracle(edits[:n], [r[0] for r in rows[:n]], [r[2] for r in rows[:n]])
    for name in ("SC", "PQ", "O"):
        pairs = torch.tensor([[score, f[name]] for score, f in zip(scores, found)])
        print(f"correlation with {name}: {torch.corrcoef(pairs.T)[0, 1]:.3f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="The folder of vlm and the editors.")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    folder = f"{args.out}/direct"
    if Path(folder).exists():
        print(f"{folder} is there already")
        return
    tok = P.tokenizer()
    tok.add_tokens([AddedToken(train_nft.RATING_RULES, special=False, normalized=False)])
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        f"{args.out}/vlm", dtype=torch.float32, attn_implementation="sdpa").to(P.DEVICE)
    model.resize_token_embeddings(len(tok))
    rng = random.Random(11)
    pool = P.editor_pool([f"{args.out}/editor_weak"], 2500, 2)
    tasks = {rating: 0.9, P.look_at_edit: 0.1}
    P.train_language(model, tok, args.steps, 1e-3, 96, tasks, rng, pool, "direct")
    P.save(model, tok, "vlm", folder)
    compare_ratings(folder, P.editor_pool([f"{args.out}/editor"], 400, 1, name=1))


if __name__ == "__main__":
    main()

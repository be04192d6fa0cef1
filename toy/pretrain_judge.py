"""Train the toy's judge: the VLM that rates an editor's pictures in stage 6 (evaluate.py judge).

In the paper this is a large model that has nothing to do with the reward. Here it shares the size
and the tokens with toy/models/vlm, but no weights: it is trained from nothing with another seed. It
learns evaluate.py's own prompts on edits of the two editors: success and restraint of an edit,
naturalness and cleanliness of a picture, as the oracle reads them. It first says what it sees,
place by place. It has seen no edit of an editor that Flow-GRPO has changed.

    python toy/pretrain_judge.py --out runs/models
"""
import argparse
import random
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import evaluate             # noqa: E402
import pretrain as P        # noqa: E402
import world as W           # noqa: E402

FIXED = [evaluate.SC_RULES, evaluate.PQ_RULES, '{"success": ', ', "restraint": ',
         '{"naturalness": ', ', "cleanliness": ', ", then", ", now", "Asked:", ". Kept:",
         "0.0", "5.0", "10.0"]


def things(scene):
    """The words for the background and for each place of a scene."""
    return [W.BACKGROUND_NAMES[scene[0]]] + [P.thing(code) for code in scene[1:]]


def change_marks(rng, row, found):
    """What was where, what should be there, what is there now; what is done and kept; the marks."""
    scene, instruction, target = row
    names = [" background"] + [f" {place}:" for place in W.PLACES]
    text = "Seen:"
    for name, was, wanted, is_now in zip(
            names, things(scene), things(target), things(found["shown"])):
        answer = "yes" if is_now == wanted else "no"
        text += f"{name} {was}, then {wanted}, now {is_now} {answer}\n"
    categories = [p["category"] for p in W.principles(scene, target)]
    answers = {"follow": "", "keep": "", "quality": ""}
    for category, answer in zip(categories, found["verdict"]):
        answers[category] += " yes" if answer else " no"
    text += f"Asked:{answers['follow']}. Kept:{answers['keep']}.\n"
    follow, keep = W.follow_and_keep(categories, found["verdict"])
    text += f'{{"success": {10 * follow:.1f}, "restraint": {10 * keep:.1f}}}'
    return evaluate.sc_chat(*P.PICTURES, instruction), text


def picture_marks(rng, row, found):
    """The edit alone: what it shows, clean or smudged; then the same mark twice."""
    seen = P.describe(found["shown"], "edited", found["clean"])
    mark = found["PQ"]
    text = f'{seen}{{"naturalness": {mark:.1f}, "cleanliness": {mark:.1f}}}'
    return evaluate.pq_chat(P.PICTURES[1]), text


def compare_marks(folder, pool, n=400):
    """Greedy marks on `n` held-out edits, beside the oracle's."""
    vlm = evaluate.VLM(folder, "", torch.device(P.DEVICE))
    rows, sources, edits = pool
    rows = rows[:n]
    edits = edits[:n]
    found = W.oracle(edits, [r[0] for r in rows], [r[2] for r in rows])
    sc_chats = []
    pq_chats = []
    for row, source, edit in zip(rows, sources, edits):
        sc_chats.append(evaluate.sc_chat(W.to_pil(source), W.to_pil(edit), row[1]))
        pq_chats.append(evaluate.pq_chat(W.to_pil(edit)))
    scores = []
    for sc, pq in zip(P.ask_in_parts(vlm, sc_chats, 0), P.ask_in_parts(vlm, pq_chats, 0)):
        scores.append(evaluate.edit_scores(
            evaluate.parse_ratings(sc, ["success", "restraint"]),
            evaluate.parse_ratings(pq, ["naturalness", "cleanliness"])))
    for name in ("SC", "PQ", "O"):
        known = [(s[name], f[name]) for s, f in zip(scores, found) if s[name] is not None]
        said, true = torch.tensor(known).view(-1, 2).unbind(1)
        print(f"{name}: {len(known)}/{n} read, mean {said.mean():.2f} (oracle {true.mean():.2f}), "
              f"within 0.5 of the oracle's: {((said - true).abs() <= 0.5).float().mean():.3f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="The folder of all models, with the editors.")
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    folder = f"{args.out}/judge"
    if Path(folder).exists():
        print(f"{folder} is there already")
        return
    tok = P.tokenizer()
    tok.add_tokens([AddedToken(text, special=False, normalized=False) for text in FIXED])
    rng = random.Random(7)
    editors = [f"{args.out}/{name}" for name in ("editor_weak", "editor")]
    pool = P.editor_pool(editors, 2500, 1)
    model = P.new_vlm(tok, "vlm", 7, rng, pool)
    tasks = {change_marks: 0.8, picture_marks: 0.2}
    P.train_language(model, tok, args.steps, 1.5e-3, 48, tasks, rng, pool, "judge")
    P.save(model, tok, "vlm", folder)
    compare_marks(folder, P.editor_pool(editors, 200, 1, name=1))


if __name__ == "__main__":
    main()

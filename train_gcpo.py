"""Stage 4 of 6: sharpen the verifier on human preferences with GCPO (Edit-R1, arXiv 2604.27505, 3).

People preferred one of two edits of a picture (winner w, loser l). The verifier writes N verdicts
on each; verdict j ends in a score τ_j. Nobody labels scores: a verdict is good if it *ranks* right.

    r^w_j = 1/N Σ_k 1[τ^w_j > τ^l_k]   share of the loser's scores that it beats          win_ratios
    r^l_j = 1/N Σ_k 1[τ^l_j < τ^w_k]   share of the winner's scores that it stays below   win_ratios
    A_j   = r_j - mean(r)              in each group of N; not divided by the std         advantages
    J     = mean over 2N verdicts of mean over tokens t of
            min(ρ_t A, clip(ρ_t, 1-ε, 1+ε) A),  ρ = π_new / π_old;  maximised           clipped_loss

If all can be read, mean r^w = mean r^l = the chance that a verdict on the winner beats one on the
loser: the reward *is* the pair accuracy. A group of equal ratios (solved, hopeless) is dead: A = 0.

    preferences.jsonl {id, source, instruction, principles, chosen, rejected} + the SFT-RRM
      -> N verdicts per edit -> win ratios -> advantages -> clipped policy gradient
      -> out/model (the RL-RRM, in fp32), metrics.jsonl, samples/ (held-out scores)

A prompt is longer than a verdict, so `prefill` computes it once: its keys and values, repeated N
times, serve the sampling (`rollout`) and, with gradient, the update (`verdict_logps`).

Shapes: B edits, or B pairs of two edits; N verdicts per edit; R = B N rows, verdict k on edit b in
row b N + k; P tokens of a prompt, T of a verdict; V vocabulary, H hidden size.

    python train_gcpo.py --toy --pairs preferences.jsonl --model sft/model --out rl   # minutes, CPU
    torchrun --nproc-per-node=8 train_gcpo.py --pairs preferences.jsonl --model sft/model --out rl

Against the paper: (1) it prints no N, ε, lr, batch, temperature (here 1) and steps: ours. (2) A
tie earns 0 on both sides, as printed; its prose on r^l contradicts the equation, which stands. No
KL, as printed. (3) An unreadable verdict earns 0 and is not in the other side's mean: ours. (4) The
vision tower is frozen, the gradient clipped to norm 1. (5) π_old is taken in the first update, not
in the rollout, from which in bf16 other kernels set it apart (metric `gap`): with --updates 1 the
ratio is 1, and the clip acts only with more. (6) Up to rounding, results do not depend on ranks or
restarts in fp32; in bf16 a batch of another shape can round a token the other way.

What to change for ... half a win for a tie: `win_ratios`. Clip-higher (DAPO): the two bounds in
`clipped_loss`. GRPO's advantage: divide by the std in `advantages`. A LoRA: `load_policy`. Another
VLM family: `Encoder` (pictures into tokens) and `prefill` (positions).
"""
import argparse, json, math, os, re, shutil, sys, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from PIL import Image, ImageOps
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

TOY = dict(held_out=48, max_new=128, rollout_edits=24, steps=120, lr=1e-4, micro=8, every=20)


def parse_args():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--toy", action="store_true", help=f"small enough for a CPU: {TOY}")
    # data
    flags.add_argument("--pairs", required=True, help="preferences.jsonl")
    flags.add_argument("--model", required=True, help="the SFT-RRM: a Qwen2.5-VL or Qwen3-VL")
    flags.add_argument("--out", required=True, help="folder for model/, metrics.jsonl, samples/")
    flags.add_argument("--held_out", type=int, default=64, help="last pairs, only judged")
    # rollout
    flags.add_argument("--group_size", type=int, default=8, help="N, verdicts per edit")
    flags.add_argument("--max_new", type=int, default=1024, help="longest verdict in tokens")
    flags.add_argument("--rollout_edits", type=int, default=16, help="sampled together; KV cache")
    # update
    flags.add_argument("--steps", type=int, default=625, help="one epoch of 10,000 pairs")
    flags.add_argument("--pairs_per_step", type=int, default=16, help="over all GPUs")
    flags.add_argument("--updates", type=int, default=1, help="optimizer steps per rollout")
    flags.add_argument("--clip_eps", type=float, default=0.2, help="ε, as in PPO")
    flags.add_argument("--lr", type=float, default=1e-6, help="AdamW, constant after 10 steps")
    flags.add_argument("--micro", type=int, default=1, help="edits per forward of the update")
    # run
    flags.add_argument("--seed", type=int, default=0, help="of pairs' order and sampled tokens")
    flags.add_argument("--every", type=int, default=50, help="steps between looks, and states")
    flags.add_argument("--resume", action="store_true", help="go on from the last state in --out")
    if "--toy" in sys.argv:
        flags.set_defaults(**TOY)
    return flags.parse_args()


# ---------------------------------------------------------------- the verdict

VERDICT_RULES = """\
Judge how well the second image carries out the instruction on the first one. Say first what you
see, then answer the questions, if any, one by one, 1 for yes, 0 for no or when in doubt. A change
of degree must be plain to see, a removal complete, a move large. Left and right of a person are the
person's own. Where a question contradicts the instruction, the instruction wins. What it leaves
alone must stay: a thing changed, lost or invented costs more than a half-done edit. The score from
0 to 10, decimals welcome, is your own judgement and no mean of the answers: 0 is useless or
unedited, 5 half usable, 8 nearly perfect. End with exactly these lines, the last one alone if there
are no questions:
[{"question": the question, "score": 0 or 1}, ... one entry per question, in order]
{"average_score": the share of ones}
<score>your score</score>"""


def verdict_chat(source, edit, instruction, principles):
    """The reward model's one prompt; without principles it asks for reasoning and a score alone."""
    questions = "".join(f"- ({p['category']}) {p['question']}\n" for p in principles) or "none\n"
    return [{"role": "user", "content": [
        {"type": "text", "text": "Source image: "}, {"type": "image", "image": source},
        {"type": "text", "text": "\nEdited image: "}, {"type": "image", "image": edit},
        {"type": "text", "text": f"\nInstruction: {instruction}\nQuestions:\n{questions}"
                                 f"{VERDICT_RULES}"}]}]


def parse_verdict(text, n_questions):
    """(0/1 per question, average in 0..1, score in 0..10) as last written in `text`, or None.

    Nothing is guessed. Without questions there is no list, and the average is score / 10.
    """
    number, text = r"\s*([0-9]+(?:\.[0-9]+)?)\s*", re.sub(r"```(?:json)?|\*", "", text)
    average = rf"""\{{\s*["']average_score["']\s*:{number}\}}\s*""" if n_questions else ""
    *_, match = [None, *re.finditer(rf"{average}<score>{number}</score>", text)]
    average, score = (float(match[1]), float(match[match.lastindex])) if match else (0, math.inf)
    if score > 10 or n_questions and average > 1:
        return None
    if not n_questions:
        return [], score / 10, score
    _, *lists = re.split(r"""\[\s*(?=\{\s*["']\w+["']\s*:)""", text[:match.start()].rstrip())
    answers = re.findall(r"""["']score["']\s*:\s*([^\s,}]*)\s*[,}]""", lists[-1]) if lists else []
    good = len(answers) == n_questions and {*answers} <= {"0", "1"} and lists[-1].endswith("]")
    return ([*map(int, answers)], average, score) if good else None


# ---------------------------------------------------------------- the mathematics

def win_ratios(tau_w, tau_l):
    """Scores (..., N) of the winner and of the loser, NaN = unreadable -> r^w, r^l (..., N)."""
    wins = tau_w[..., :, None] > tau_l[..., None, :]              # (..., N, N); NaN never wins
    n_w, n_l = ((~tau.isnan()).sum(-1, keepdim=True).clamp(min=1) for tau in (tau_w, tau_l))
    return wins.sum(-1) / n_l, wins.sum(-2) / n_w


def advantages(r):
    """A_j = r_j - mean(r) in groups (..., N); without the std, nearly solved pairs pull less."""
    return r - r.mean(-1, keepdim=True)


def clipped_loss(logp, old_logp, advantage, mask, clip_eps):
    """PPO's clipped objective: mean over a verdict's tokens, then over verdicts; to be minimised.

    logp, old_logp (R, T), advantage (R,), mask (R, T) = the verdicts' tokens -> scalar
    """
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    gain = torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None]) * mask
    return -(gain.sum(1) / mask.sum(1).clamp(min=1)).mean()


# ---------------------------------------------------------------- the policy

def prefill(model, encode, chats, n):
    """Compute B prompts once, so that n verdicts can go on from each.

    -> KV cache of R rows, last state (R, 1, H), attention mask (R, P), next position (R, 1)
    """
    inputs = encode(chats).to(model.device)
    out, mask = model.model(**inputs, use_cache=True), inputs["attention_mask"]
    out.past_key_values.batch_repeat_interleave(n)             # autograd sums over the n rows
    start = mask.sum(1, keepdim=True) + model.model.rope_deltas    # a picture spans few positions
    return out.past_key_values, *(
        x.repeat_interleave(n, 0) for x in (out[0][:, -1:], mask, start))


def policy_logp(logits, banned):
    """Log-probs in fp32; image and video placeholders (no pixels behind them) are never written."""
    return logits.float().index_fill(-1, banned, -math.inf).log_softmax(-1)


@torch.no_grad()
def rollout(model, encode, chats, n, u):
    """Sample n verdicts per chat; u (R, T) decides the tokens by the inverse CDF.

    -> tokens, their log-probs, keep = up to and with the end token: all (R, T)
    """
    cache, hidden, mask, position = prefill(model, encode, chats, n)
    banned, ends = (torch.tensor(x, device=model.device) for x in (encode.banned, encode.ends))
    u, alive = u.to(model.device), torch.arange(len(u), device=model.device)
    pad, logp = encode.tokenizer.pad_token_id, torch.zeros_like(u)
    tokens = torch.full_like(u, pad, dtype=torch.long)
    keep = torch.zeros_like(u, dtype=torch.bool)
    for t in range(u.shape[1]):
        logps = policy_logp(model.lm_head(hidden[:, -1]), banned)
        cdf = logps.exp().cumsum(-1)
        token = (cdf <= u[alive, t, None] * cdf[:, -1:]).sum(-1, keepdim=True)
        tokens[alive, t], keep[alive, t] = token[:, 0], True
        logp[alive, t] = logps.gather(1, token)[:, 0]
        going = (~torch.isin(token[:, 0], ends)).nonzero()[:, 0]
        if not len(going) or t == u.shape[1] - 1:
            break
        if len(going) < len(alive):                               # finished rows leave the batch
            cache.batch_select_indices(going)
            alive, token, mask, position = (x[going] for x in (alive, token, mask, position))
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        hidden = model.model(input_ids=token, attention_mask=mask, past_key_values=cache,
                             use_cache=True, position_ids=(position + t).expand(3, -1, -1))[0]
    return tokens, logp, keep


def verdict_logps(model, encode, chats, tokens, keep):
    """log π of N verdicts on each of B chats, with gradient: tokens, keep (R, T) -> (R, T)."""
    cache, hidden, mask, position = prefill(model, encode, chats, len(tokens) // len(chats))
    position = position + torch.arange(tokens.shape[1] - 1, device=tokens.device)
    rest = model.model(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True,
                       attention_mask=torch.cat([mask, keep[:, :-1].long()], 1),
                       position_ids=position.expand(3, -1, -1))[0]
    hidden = torch.cat([hidden, rest], 1)[keep]                # the state that predicts each token
    banned = torch.tensor(encode.banned, device=model.device)

    def head(states, token):
        logps = policy_logp(model.lm_head(states), banned)
        return logps.gather(1, token[:, None])[:, 0]

    # in checkpointed pieces, so that the table (tokens, V) never exists as a whole
    logp = torch.cat([checkpoint(head, *piece, use_reentrant=False)
                      for piece in zip(hidden.split(2048), tokens[keep].split(2048))])
    return torch.zeros(tokens.shape, device=logp.device).masked_scatter(keep, logp)


# ---------------------------------------------------------------- the phases of a step

def pair_chats(args, pair):
    """The prompts on a pair's two edits."""
    source, *edits = (open_image(args.pairs, pair, key) for key in ("source", "chosen", "rejected"))
    return [verdict_chat(source, edit, pair["instruction"], pair["principles"]) for edit in edits]


def judge_pairs(model, encode, pairs, draw_key, args):
    """N verdicts on both edits of B pairs: 2B chats; tokens, logp, keep (2B N, T); tau (B, 2, N)"""
    n, size = args.group_size, args.rollout_edits
    chats = [chat for pair in pairs for chat in pair_chats(args, pair)]
    u = uniforms([(args.seed, draw_key, pair["id"], side, k) for pair in pairs
                  for side in ("chosen", "rejected") for k in range(n)], args.max_new)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        parts = [model.rollout(encode, chats[i:i + size], n, u[i * n:(i + size) * n])
                 for i in range(0, len(chats), size)]
    tokens, logp, keep = (torch.cat(part) for part in zip(*parts))
    longest = int(keep.sum(1).max())
    tokens, logp, keep = (x[:, :longest] for x in (tokens, logp, keep))
    texts = encode.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    read = [parse_verdict(text, len(pairs[row // (2 * n)]["principles"]))
            for row, text in enumerate(texts)]
    tau = torch.tensor([verdict[2] if verdict else math.nan for verdict in read])
    return chats, tokens, logp, keep, tau.view(len(pairs), 2, n)


def score_metrics(tau):
    """What scores (B, 2, N) say; dead: the groups that teach nothing."""
    w, l = tau[:, 0, :, None], tau[:, 1, None, :]
    r = torch.stack(win_ratios(*tau.unbind(1)), 1)                                # (B, 2, N)
    found = dict(win=w > l, tie=w == l, parsed=~tau.isnan(), score_w=w, score_l=l,
                 dead=(r == r[..., :1]).all(2))
    return {name: values.float().nanmean().item() for name, values in found.items()}


def look_at_pairs(model, encode, held, step, rank, world, args):
    """Judge the held-out pairs, always by the same random numbers; the scores go to samples/."""
    tau = judge_pairs(model, encode, held[rank::world], "held out", args)[-1]
    found = sorted(gather_rows([*zip(range(rank, len(held), world), tau.tolist())]))
    if rank == 0:
        clean = [[[s if s == s else None for s in side] for side in pair] for _, pair in found]
        rows = [dict(id=pair["id"], chosen_scores=w, rejected_scores=l)
                for pair, (w, l) in zip(held, clean)]
        Path(args.out, f"samples/step_{step:06d}.json").write_text(json.dumps(rows))
        metrics = score_metrics(torch.tensor([scores for _, scores in found]))
        log_step(args, step, {f"held_{name}": metrics[name] for name in ("win", "tie", "parsed")})


def main():
    args = parse_args()
    rank, world, device = setup()
    pairs = read_rows(args.pairs, ("source", "instruction", "principles", "chosen", "rejected"),
                      "It holds people's preferences between two edits (README, stage 4).")
    held = pairs[len(pairs) - args.held_out:]
    known = {pair["source"] for pair in held}
    train = [pair for pair in pairs if pair["source"] not in known]
    if len(train) < args.pairs_per_step or min(len(held), args.pairs_per_step) < world:
        raise SystemExit(f"{args.pairs}: {len(pairs)} pairs are too few for --pairs_per_step and "
                         f"--held_out on {world} rank(s).")
    if rank == 0:                      # a torn picture must not stop the run an hour later
        all(ThreadPoolExecutor().map(partial(pair_chats, args), pairs))
    model, encode = load_policy(args.model, device, world)
    model.rollout, model.logps = partial(rollout, model), partial(verdict_logps, model)
    for method in ("rollout", "logps") if world > 1 else ():
        register_fsdp_forward_method(model, method)    # inside these the outer weights are whole
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=0)
    first = start_run(args, model, optimizer, rank)
    n, groups = args.group_size, 2 * args.pairs_per_step

    for step in range(first, args.steps + 1):
        # ---- look at the held-out pairs, save
        if step % args.every == 0 or step == args.steps:
            if step > first:
                save_state(args.out, step, model, optimizer, rank)
            look_at_pairs(model, encode, held, step, rank, world, args)
        if step == args.steps:
            break

        # ---- rollout: N verdicts on both edits of this rank's pairs
        numbers = batch_rows(len(train), args.pairs_per_step, args.seed, step)[rank::world]
        chats, tokens, sampled_logp, keep, tau = judge_pairs(
            model, encode, [train[i] for i in numbers], step, args)

        # ---- win ratios -> advantages; a group of equal ratios teaches nothing and is left out
        r = torch.stack(win_ratios(*tau.unbind(1)), 1).flatten(0, 1)       # (2B, N), as the chats
        advantage = advantages(r).flatten().to(device)
        live = (r != r[:, :1]).any(1).nonzero()[:, 0].tolist()
        passes = [live[i:i + args.micro] for i in range(0, len(live), args.micro)]
        n_passes = max(gather_rows([len(passes)]))   # FSDP2: as many on every rank, empty ones last
        passes += [[]] * (n_passes - len(passes))

        # ---- update; the loss is the mean over all groups of the step, those left out being zeros
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 10)
        old_logp, gaps, outside = torch.zeros_like(sampled_logp), [], []
        for update in range(args.updates):
            for some in passes:
                edits = some or [0]                        # an empty pass computes, and counts zero
                rows = torch.tensor([e * n + k for e in edits for k in range(n)], device=device)
                cut = int(keep[rows].sum(1).max())              # this pass's own longest verdict
                mask = keep[rows, :cut]
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logp = model.logps(encode, [chats[e] for e in edits], tokens[rows, :cut], mask)
                if some and update == 0:
                    old_logp[rows, :cut] = logp.detach()
                    gaps.append((old_logp - sampled_logp)[rows, :cut][mask].abs().cpu())
                old = old_logp[rows, :cut]
                loss = clipped_loss(logp, old, advantage[rows], mask, args.clip_eps)
                (loss * len(some) / groups * world).backward()    # FSDP2: the mean over the ranks
                if some:
                    ratio = (logp.detach() - old)[mask].exp()
                    outside.append(((ratio - 1).abs() > args.clip_eps).float().cpu())
            norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
            norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
            if not math.isfinite(norm):
                raise SystemExit(f"step {step}: the gradient's norm is {norm}. Lower --lr.")
            optimizer.step()
            optimizer.zero_grad()

        # ---- log the scores of all ranks; of rank 0 length, gap, tokens outside the clip range
        tau = torch.tensor(gather_rows(tau.tolist()))
        if rank == 0:
            gap, outside = (torch.cat(part or [torch.zeros(1)]).mean() for part in (gaps, outside))
            log_step(args, step, score_metrics(tau) | dict(
                length=keep.sum(1).float().mean(), gap=gap, outside=outside, grad_norm=norm))
    save_model(model, encode, f"{args.out}/model", rank)
    if world > 1:                      # gloo's threads can die in Python's own exit
        dist.barrier()
        os._exit(0)


# ---------------------------------------------------------------- helpers, the same in every script

def read_rows(path, fields, made_by):
    """The rows of a JSONL file: every line whole, every id once, every field there."""
    rows = {}
    try:
        for line in Path(path).read_bytes().splitlines() or [b""]:
            row = json.loads(line)
            asked = [[p["question"], p["category"]] for p in row.get("principles", ())]
            if row["id"] in rows or "<|" in row.get("instruction", "") + str(asked):
                raise ValueError("its id twice, or a token <|...|>")
            rows[row["id"]] = row | {name: row[name] for name in fields}  # KeyError: one is missing
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{path}, line {len(rows) + 1}: {error!r}. Mend it. {made_by}")
    return [*rows.values()]


def open_image(path, row, key, max_pixels=512 * 28 * 28):
    """The picture row[key] of the JSONL file `path`: RGB, upright, on white, at most max_pixels."""
    try:
        file = Image.open(Path(path).parent / str(row[key]))
        image = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SystemExit(f"{path}, row {row['id']}: {key} {row[key]} does not open ({error}). "
                         "Restore the picture or delete the row.")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.thumbnail([side * (max_pixels / math.prod(image.size)) ** 0.5 for side in image.size])
    return image


def load_policy(folder, device, world):
    """(model, Encoder) to train, in fp32, the vision tower frozen; FSDP2 if there are more ranks.

    A rank then keeps its part of weights and moments, and whole layers from a forward to the next
    backward: ranks that sample need not wait for each other.
    """
    model, encode = load_vlm(folder, "cpu" if world > 1 else device, torch.float32)
    layers, vision = model.model.language_model.layers, model.model.visual.requires_grad_(False)
    for layer in layers if device.type == "cuda" else ():   # recompute the MLPs: most of the memory
        layer.mlp.forward = partial(checkpoint, layer.mlp.forward, use_reentrant=False)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = MixedPrecisionPolicy(half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in [*layers, *vision.blocks, model] if world > 1 else ():
        fully_shard(module, mp_policy=policy, reshard_after_forward=False)
    return model, encode


def load_vlm(folder, device, dtype):
    """(model, Encoder) of a local folder or hub id: any Qwen2.5-VL or Qwen3-VL."""
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        return model.to(device).eval(), Encoder(folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} is no Qwen2.5-VL or Qwen3-VL: {str(error).splitlines()[0]}")


def place_pictures(images, tokenizer, pictures, texts):
    """Texts as model inputs; their placeholders, in order, stand for the pictures."""
    inputs = images(pictures, return_tensors="pt")
    sizes = iter((inputs["image_grid_thw"].prod(-1) // images.merge_size ** 2).tolist())
    texts = [re.sub(r"<\|image_pad\|>", lambda pad: pad[0] * next(sizes), t) for t in texts]
    inputs.update(tokenizer(texts, return_tensors="pt", padding=True))
    places = inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return inputs | dict(mm_token_type_ids=places.int())        # without it no 3-D positions


class Encoder:
    """Chats with pictures -> left-padded model inputs: an AutoProcessor without torchvision."""

    def __init__(self, folder):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.images = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.banned = self.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
        self.ends = [self.tokenizer.eos_token_id, self.tokenizer.pad_token_id]   # either may end it

    def __call__(self, chats):
        text = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        images = [part["image"] for [turn] in chats for part in turn["content"] if "image" in part]
        return place_pictures(self.images, self.tokenizer, images, text)


def uniforms(keys, length):
    """A row of numbers in [0, 1) per key: the same whatever the batch, the ranks or a restart."""
    rows = [np.random.default_rng(seed_of(*key)).random(length) for key in keys]
    return torch.tensor(np.stack(rows), dtype=torch.float32).clamp(max=1 - 1e-7)


def seed_of(*key):
    """A seed of its own for every key, such as (seed, stage, row id, k)."""
    return int(np.random.SeedSequence([*repr(key).encode()]).generate_state(1)[0])


def batch_rows(n, size, seed, step):
    """The row numbers of one step: every epoch is its own permutation, cut into whole batches."""
    epoch, place = divmod(step, n // size)
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return order[place * size:(place + 1) * size].tolist()


def setup():
    """Join the process group that torchrun announced, or run alone: rank, world size, device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.enable_cudnn_sdp(False)     # its gradients are wrong (pytorch 196678)
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def gather_rows(rows):
    """The lists of all ranks, joined in rank order, on every rank."""
    parts = [rows]
    if dist.is_initialized():
        parts *= dist.get_world_size()
        dist.all_gather_object(parts, rows)
    return sum(parts, [])


STATE = states.StateDictOptions(                        # one file, whatever the number of ranks
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def start_run(args, model, optimizer, rank):
    """Begin a run in --out, or go on with its last state: the step to begin with."""
    out, saved = Path(args.out), dict(step=0, logged=0)
    if args.resume and (out / "state.pt").exists():
        saved = torch.load(out / "state.pt", weights_only=True, mmap=True)
        states.set_state_dict(model, optimizer, model_state_dict=saved["model"],
                              optim_state_dict=saved["optimizer"], options=STATE)
    if rank == 0:
        if (out / "metrics.jsonl").exists() and not args.resume:
            raise SystemExit(f"{out} holds an earlier run: --resume it, or give another --out.")
        (out / "samples").mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(vars(args), indent=1))
        with open(out / "metrics.jsonl", "ab") as file:
            file.truncate(saved["logged"])              # rows since the state come again
    args.begun, args.first = time.time(), saved["step"]
    return args.first


def save_state(out, step, model, optimizer, rank):
    """All that --resume needs, written beside and renamed: a kill leaves one of the two."""
    weights, moments = states.get_state_dict(model, optimizer, options=STATE)     # of all ranks
    if rank == 0:
        torch.save(dict(step=step, logged=os.path.getsize(f"{out}/metrics.jsonl"), model=weights,
                        optimizer=moments), f"{out}/state.tmp")
        os.replace(f"{out}/state.tmp", f"{out}/state.pt")


def save_model(model, encode, folder, rank):
    """A Hugging Face folder, written beside and renamed; fp32: bf16 rounds small updates away."""
    state = states.get_model_state_dict(model, options=states.StateDictOptions(
        full_state_dict=True, cpu_offload=True))                  # every rank takes part
    if rank == 0:
        state = {name: state[name] for name, _ in model.named_parameters()}   # a tied weight once
        model.save_pretrained(f"{folder}.tmp", state_dict=state)
        encode.tokenizer.save_pretrained(f"{folder}.tmp")
        encode.images.save_pretrained(f"{folder}.tmp")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(f"{folder}.tmp", folder)


def log_step(args, step, metrics):
    """One line on the screen, one row in metrics.jsonl (null: no number)."""
    metrics = {name: float(value) for name, value in metrics.items()}
    eta = (time.time() - args.begun) / max(1, step - args.first) * (args.steps - step) / 60
    print(f"step {step:4d}/{args.steps} | {' | '.join(f'{k} {v:.3g}' for k, v in metrics.items())}"
          f" | eta {eta:.1f} min", flush=True)
    row = dict(step=step) | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    with open(f"{args.out}/metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

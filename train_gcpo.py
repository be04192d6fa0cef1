"""Stage 4 of 6: train the reward model on human preference pairs by reinforcement learning (GCPO).

This is Group Contrastive Preference Optimization, section 3 of Edit-R1 (arXiv 2604.27505):

    policy    the reward model itself, a vision-language model (VLM) that writes verdicts
    state     a prompt (source image, edited image, instruction, questions) and the tokens so far
    action    the next token; a whole verdict ends with a score tau from 0 to 10
    reward    one number for a whole verdict: the win ratio of its score
    group     the N verdicts on one edit; their mean reward is the baseline (no value network)

A person preferred the edit w (`chosen`) to the edit l (`rejected`), but nobody has labeled scores.
So a verdict earns the share of verdicts on the other edit against which its score ranks the pair
correctly. One training step on one rank has B pairs, E = 2B edits, and R = E N verdicts:

    B pairs
      -> generate_rollout        build_prompts: edit 2b is chosen, 2b + 1 is rejected   E prompts
                                 Policy.sample: verdict k on edit e is row e N + k      (R, T)
                                 read_scores: NaN if a verdict cannot be parsed         (B, 2, N)
      -> compute_rewards         win_ratios                                             (E, N)
      -> advantages                                                                     (E, N)
      -> make_micro_batches      skips zero-variance groups (rewards all equal: no gradient)
      -> update_policy           Policy.get_per_token_logps                             (rows, T)
                                 clipped_loss, backward pass, AdamW                     scalar

    T = tokens of a verdict, padded to the longest of its batch. P = tokens of a prompt. V = size of
    the vocabulary. H = hidden size. Policy's methods and clipped_loss see one batch at a time:
    there E and R count its edits and its verdicts.

    r_w[j] = mean over k of 1[tau_w[j] > tau_l[k]]                             win_ratios
    r_l[j] = mean over k of 1[tau_l[j] < tau_w[k]]                             win_ratios
    A[j]   = r[j] - mean(r), within each group of N                            advantages
    rho_t  = pi_new(token t) / pi_old(token t)                                 clipped_loss
    J[j]   = mean over t of min(rho_t A[j], clip(rho_t, 1 - eps, 1 + eps) A[j])
    loss   = - mean of J[j] over all verdicts                                  clipped_loss

A worked number with N = 3: the chosen edit has the scores 8, 6, 5, and the rejected one 7, 5, 4.

    r_w = 1, 2/3, 1/3     A_w = 1/3, 0, -1/3     The 6 beats 5 and 4. A tie, 5 and 5, earns nothing.
    r_l = 1/3, 2/3, 1     A_l = -1/3, 0, 1/3     The 4 is below 8, 6 and 5.

Both groups have the mean reward 2/3: the share of the N x N comparisons that rank the pair
correctly (if every verdict can be parsed). With --update_epochs 1 the ratio rho is exactly 1, the
clip does nothing, and GCPO is REINFORCE with a group baseline.

    python train_gcpo.py --toy --pairs preferences.jsonl --model sft/model --out rl   # toy models
    torchrun --nproc-per-node=8 train_gcpo.py --pairs preferences.jsonl --model sft/model --out rl

A row of preferences.jsonl (image paths are relative to the file; `principles` may be empty):
    {"id": "7", "source": "7.png", "chosen": "7a.png", "rejected": "7b.png", "instruction":
     "remove the dog", "principles": [{"category": "follow", "question": "Is the dog gone?"}]}
--out gets model/, checkpoint.pt (for --resume), config.json (flags), metrics.jsonl (a row for every
step and every evaluation) and samples/step_*.jsonl (verdicts and scores; null = not parsed).

Healthy metrics (see `score_metrics` and `update_policy`): eval_pair_accuracy rises (in the toy from
.63 to .73), tie_rate falls (.05 to .03), parse_rate stays near 1, truncated_rate near 0.
frac_reward_zero_std rises as pairs are solved. rollout_logp_diff stays below 1e-5 in fp32, near
1e-2 in bf16. As only their order is rewarded, chosen_score and rejected_score may drift.

Differences from the paper:
    1. The paper does not report N, eps, lr, batch size, temperature or steps. We chose them.
    2. A tie earns 0, as in the paper's equations. The paper's text has r_l reversed (it counts the
       winner's scores below tau_l); we follow its equation and its figure.
    3. The paper does not treat verdicts that cannot be parsed. Here such a verdict earns 0, so it
       has a negative advantage if its group has any win, and the win ratios of the other edit are
       means over the parsed verdicts.
    4. The vision tower is frozen, and the gradient is clipped to norm 1.

What to change for ...
    another reward          `compute_rewards`; if it needs more than scores, `read_scores` as well
    half a win for a tie    `wins` in `win_ratios`
    GRPO's advantage        `advantages`: divide by the standard deviation + 1e-4
    clip-higher (DAPO)      `clip_ratio`: a larger upper bound (acts from --update_epochs 2 on)
    a KL to the SFT model   `main`: load a second, frozen policy; `update_policy`: add the KL to
                            `loss`; `make_micro_batches`: keep the zero-variance groups
    a LoRA                  `load_policy`: freeze the VLM and add adapters (alike on all ranks)
                            before sharding; `save_model`: merge them into `state`; and a higher
                            --lr, such as 1e-4
    another family of VLMs  `Processor`, `Policy.prefill` and `Policy.run_tokens` (positions), and
                            the names of layers in `load_policy` and `load_trainable_vlm`
"""
import argparse
import json
import math
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import transformers
from PIL import Image, ImageOps
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

TOY = dict(num_eval=32, max_new_tokens=128, rollout_batch_size=32, steps=60,
           lr=1e-4, micro_batch_size=8, eval_every=20)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--toy", action="store_true", help=f"Use defaults for a CPU: {TOY}.")

    data = parser.add_argument_group("data")
    data.add_argument("--pairs", required=True, help="The human preferences, a JSONL file.")
    data.add_argument("--model", required=True, help="The model that train_sft.py wrote.")
    data.add_argument("--out", required=True, help="The folder for all outputs.")
    data.add_argument("--num_eval", type=int, default=64, help="Pairs held out at the end.")

    rollout = parser.add_argument_group("rollout")
    rollout.add_argument("--group_size", type=int, default=8, help="N, the verdicts per edit.")
    rollout.add_argument("--max_new_tokens", type=int, default=1024, help="Verdict length limit.")
    rollout.add_argument("--rollout_batch_size", type=int, default=16,
                         help="Edits sampled at once, each with N verdicts.")

    update = parser.add_argument_group("update")
    update.add_argument("--steps", type=int, default=625, help="About one epoch of 10,000 pairs.")
    update.add_argument("--pairs_per_step", type=int, default=16, help="Total over all ranks.")
    update.add_argument("--update_epochs", type=int, default=1, help="Optimizer steps per rollout.")
    update.add_argument("--clip_eps", type=float, default=0.2, help="The eps of PPO's clip.")
    update.add_argument("--lr", type=float, default=1e-6, help="The learning rate after warm-up.")
    update.add_argument("--warmup_steps", type=int, default=10, help="Steps of linear warm-up.")
    update.add_argument("--micro_batch_size", type=int, default=1, help="Edits per backward pass.")

    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="For data order and sampling.")
    run.add_argument("--eval_every", type=int, default=50, help="Steps between evaluations.")
    run.add_argument("--resume", action="store_true", help="Continue the run in --out.")

    args = parser.parse_args()
    if args.toy:                    # The toy's values become defaults; explicit flags still win.
        parser.set_defaults(**TOY)
        args = parser.parse_args()
    return args


# ------------------------------------------------------------ the verdict: prompt and parser

VERDICT_RULES = """\
Judge how well the second image carries out the instruction on the first image. First describe what
you see. Then answer each question, if there are any, with 1 for yes, or with 0 for no or if you are
not sure. A change of degree must be clearly visible, a removal must be complete, and a move must be
large. "Left" and "right" of a person mean that person's own left and right. If a question
contradicts the instruction, follow the instruction. Everything that the instruction does not
mention must stay the same: it is worse to change, lose or invent something than to complete only
half of the edit. The score is your own judgement from 0 to 10, not the average of the answers, and
it may have decimals: 0 means useless or unedited, 5 half usable, 8 nearly perfect. End with exactly
these lines, or with the last one alone if there are no questions:
[{"question": the question, "score": 0 or 1}, ... one entry per question, in order]
{"average_score": the share of ones}
<score>your score</score>"""


def verdict_chat(source, edit, instruction, principles):
    """The chat that asks for a verdict. Without principles it asks for reasoning and a score."""
    questions = ""
    for principle in principles:
        questions += f"- ({principle['category']}) {principle['question']}\n"
    if not principles:
        questions = "none\n"
    task = f"\nInstruction: {instruction}\nQuestions:\n{questions}{VERDICT_RULES}"
    return [{"role": "user", "content": [
        {"type": "text", "text": "Source image: "},
        {"type": "image", "image": source},
        {"type": "text", "text": "\nEdited image: "},
        {"type": "image", "image": edit},
        {"type": "text", "text": task}]}]


class Verdict(NamedTuple):
    verdict: list           # the answers: 0 or 1 for each question
    average: float          # the share of ones that the model states, from 0 to 1
    score: float            # the model's own judgement, from 0 to 10 (tau in the paper)


def drop_reasoning(text):
    """The reply of a thinking model without <think>...</think>, also if that was cut off.

    If the chat template itself opens <think>, a thought that is cut off looks like a reply.
    """
    return text.rpartition("</think>")[2].partition("<think>")[0]


# The parts of a verdict, each with an example. These are not parsed as JSON, because a model may
# write single quotes.
NUMBER = r"([0-9]+(?:\.[0-9]+)?)"                                           # 7.5
SCORE = rf"<score>\s*{NUMBER}\s*</score>"                                   # <score>7.5</score>
AVERAGE = rf"""\{{\s*["']average_score["']\s*:\s*{NUMBER}\s*\}}"""          # {"average_score": 0.8}
LIST_START = r"""\[\s*\{\s*["']\w+["']\s*:"""                               # [{"question":
ANSWER = r"""["']score["']\s*:\s*([^\s,}]*)\s*[,}]"""                       # "score": 1}


def parse_verdict(text, n_questions):
    """The verdict at the end of `text`, or None if a part of it is missing or malformed.

    It is read from its end: the score, then the average before it, then the list before that.
    Nothing is guessed or repaired, apart from Markdown. Without questions a verdict has no list and
    no average; its average is then score / 10.
    """
    text = drop_reasoning(text)                     # a score inside a thought is only a draft
    text = re.sub(r"```(?:json)?|\*", "", text)     # drop Markdown
    scores = list(re.finditer(SCORE, text))
    if not scores:
        return None
    last_score = scores[-1]
    score = float(last_score[1])
    if score > 10:
        return None
    text_after = text[last_score.end():]            # other text may follow, but no broken verdict
    if "<score" in text_after or "average_score" in text_after:
        return None
    if n_questions == 0:
        return Verdict([], score / 10, score)

    text_before = text[:last_score.start()].rstrip()
    average_match = re.search(rf"{AVERAGE}$", text_before)
    if average_match is None or float(average_match[1]) > 1:
        return None
    text_before = text_before[:average_match.start()].rstrip()
    list_starts = [match.start() for match in re.finditer(LIST_START, text_before)]
    if not list_starts or not text_before.endswith("]"):
        return None
    answers = re.findall(ANSWER, text_before[list_starts[-1]:])
    if len(answers) != n_questions or not set(answers) <= {"0", "1"}:
        return None
    return Verdict([int(answer) for answer in answers], float(average_match[1]), score)


# ------------------------------------------------------------ the mathematics

def win_ratios(tau_w, tau_l):
    """The rewards on a chosen and a rejected edit: scores (..., N) each -> r_w, r_l (..., N) each.

    NaN marks a verdict that cannot be parsed. It wins against nothing, and the mean of the other
    side is taken over the parsed verdicts only.
    """
    # wins[j, k]: verdict j on the chosen edit scores above verdict k on the rejected edit. A
    # comparison with NaN is False.
    wins = tau_w[..., :, None] > tau_l[..., None, :]                        # (..., N, N)
    num_parsed_w = (~tau_w.isnan()).sum(-1, keepdim=True).clamp(min=1)      # (..., 1)
    num_parsed_l = (~tau_l.isnan()).sum(-1, keepdim=True).clamp(min=1)      # (..., 1)
    r_w = wins.sum(-1) / num_parsed_l       # for each chosen verdict, a mean over the rejected
    r_l = wins.sum(-2) / num_parsed_w       # for each rejected verdict, a mean over the chosen
    return r_w, r_l


def advantages(r):
    """A = r - mean(r) within each group: (..., N) -> (..., N).

    GRPO also divides by the standard deviation. That would give a group whose rewards are nearly
    equal as much weight as one whose rewards differ widely.
    """
    return r - r.mean(-1, keepdim=True)


def is_zero_variance(rewards):
    """True for each group of N equal rewards, which gives no gradient: (E, N) -> (E,)."""
    return (rewards == rewards[:, :1]).all(-1)


def clip_ratio(ratio, clip_eps):
    """PPO's clip. (DAPO's clip-higher has a larger upper bound.)"""
    return ratio.clamp(1 - clip_eps, 1 + clip_eps)


def clipped_loss(logp, old_logp, advantage, mask, clip_eps):
    """PPO's clipped objective, negated: a mean over each verdict's tokens, then over the verdicts.

    logp, old_logp (R, T); advantage (R,); mask (R, T), True on the tokens of the verdict -> scalar
    """
    ratio = (logp - old_logp).exp()                                         # (R, T)
    clipped_ratio = clip_ratio(ratio, clip_eps)                             # (R, T)
    token_advantage = advantage[:, None]                                    # (R, 1)
    objective = torch.minimum(ratio * token_advantage, clipped_ratio * token_advantage)
    num_tokens = mask.sum(1).clamp(min=1)                                   # (R,)
    objective_per_verdict = (objective * mask).sum(1) / num_tokens          # (R,)
    return -objective_per_verdict.mean()


# ------------------------------------------------------------ the policy

LM_HEAD_CHUNK = 2048                    # tokens whose logits are in memory at once in the update


@dataclass
class Prefix:
    """What the VLM computed for the prompts; each of the R rows is one verdict to be written."""
    cache: transformers.Cache           # keys and values of the prompts, R rows
    last_hidden: torch.Tensor           # (R, 1, H); it predicts the first token of the verdict
    attention_mask: torch.Tensor        # (R, P), 0 on the left padding
    next_position: torch.Tensor         # (R, 1), the position of the first token of the verdict


class Policy(nn.Module):
    """The VLM that writes verdicts. `sample` serves the rollout, `get_per_token_logps` the update.

    A prompt holds two images and is longer than a verdict, and N verdicts continue each prompt. So
    both methods run a prompt only once (`prefill`) and repeat its KV cache N times. In the update,
    autograd sums the gradients of the N copies into the one prompt.
    """

    def __init__(self, vlm, processor):
        super().__init__()
        self.vlm = vlm
        self.processor = processor
        # Buffers, so that FSDP2 moves them to the GPU together with the weights.
        suppress_tokens = torch.tensor(processor.suppress_tokens, device=vlm.device)
        eos_token_ids = torch.tensor(processor.eos_token_ids, device=vlm.device)
        self.register_buffer("suppress_tokens", suppress_tokens, persistent=False)
        self.register_buffer("eos_token_ids", eos_token_ids, persistent=False)

    def prefill(self, prompts, num_verdicts):
        """Run E prompts and repeat the result, so that N verdicts can continue each of them."""
        # Token ids, attention mask, pixels, image sizes, and which tokens belong to an image.
        inputs = self.processor(prompts).to(self.vlm.device)
        # M-RoPE: every token has three positions (time, height, width). An image of h x w tokens
        # takes only max(h, w) positions, so the next position is the largest + 1 and not P.
        position_ids, _ = self.vlm.model.get_rope_index(**inputs)           # (3, E, P)
        next_position = position_ids.amax(dim=(0, 2))[:, None] + 1          # (E, 1)
        # vlm.model is the VLM without its lm_head.
        outputs = self.vlm.model(**inputs, position_ids=position_ids, use_cache=True)
        # The prompts are padded on the left, so each of them ends at the last position.
        last_hidden = outputs.last_hidden_state[:, -1:]                     # (E, 1, H)
        cache = outputs.past_key_values
        cache.batch_repeat_interleave(num_verdicts)                         # in place: E -> R rows
        return Prefix(
            cache=cache,
            last_hidden=last_hidden.repeat_interleave(num_verdicts, dim=0),
            attention_mask=inputs["attention_mask"].repeat_interleave(num_verdicts, dim=0),
            next_position=next_position.repeat_interleave(num_verdicts, dim=0))

    def run_tokens(self, cache, tokens, attention_mask, position):
        """Run text tokens that follow the cache: tokens, position (R, L) -> hidden (R, L, H)."""
        outputs = self.vlm.model(
            input_ids=tokens, attention_mask=attention_mask,
            position_ids=position.expand(3, -1, -1),    # time, height and width are equal for text
            past_key_values=cache, use_cache=True)
        return outputs.last_hidden_state

    def vocab_logps(self, hidden):
        """The log-probs of all possible next tokens, in fp32: (M, H) -> (M, V)."""
        logits = self.vlm.lm_head(hidden).float()
        # Image placeholders are never sampled, because no image would stand behind them.
        logits = logits.index_fill(-1, self.suppress_tokens, -math.inf)
        return logits.log_softmax(-1)

    def token_logps(self, hidden, tokens):
        """The log-probs of these next tokens: (M, H), (M,) -> (M,)."""
        return self.vocab_logps(hidden).gather(1, tokens[:, None])[:, 0]

    @torch.no_grad()
    def sample(self, prompts, num_verdicts, uniforms):
        """Sample N verdicts on each prompt at temperature 1.

        uniforms (R, T) in [0, 1) has one random number for each token that may be needed. Returns
        tokens, log-probs and the completion mask, (R, T) each. The mask is True up to and including
        the end token.
        """
        prefix = self.prefill(prompts, num_verdicts)
        uniforms = uniforms.to(self.vlm.device)
        num_rows, max_tokens = uniforms.shape
        prompt_length = prefix.attention_mask.shape[1]                      # P
        attention_mask = nn.functional.pad(prefix.attention_mask, (0, max_tokens), value=1)
        pad_id = self.processor.tokenizer.pad_token_id
        tokens = torch.full_like(uniforms, pad_id, dtype=torch.long)
        logps = torch.zeros_like(uniforms)
        completion_mask = torch.zeros_like(uniforms, dtype=torch.bool)

        # A verdict that ends leaves the batch. `active` holds the indices of the M unfinished rows,
        # and the cache holds the same rows.
        active = torch.arange(num_rows, device=uniforms.device)             # (M,)
        hidden = prefix.last_hidden                                         # (M, 1, H)
        for t in range(max_tokens):
            vocab_logps = self.vocab_logps(hidden[:, -1])                   # (M, V)
            next_tokens = sample_by_inverse_cdf(vocab_logps, uniforms[active, t])       # (M,)
            tokens[active, t] = next_tokens
            logps[active, t] = vocab_logps.gather(1, next_tokens[:, None])[:, 0]
            completion_mask[active, t] = True

            is_end = torch.isin(next_tokens, self.eos_token_ids)            # (M,)
            unfinished = (~is_end).nonzero()[:, 0]                          # indices into `active`
            if len(unfinished) == 0 or t + 1 == max_tokens:
                break
            if len(unfinished) < len(active):
                active = active[unfinished]
                prefix.cache.batch_select_indices(unfinished)               # in place
            # Run token t behind its P + t predecessors; its hidden state predicts token t + 1.
            hidden = self.run_tokens(
                prefix.cache, tokens[active, t:t + 1],
                attention_mask[active, :prompt_length + t + 1], prefix.next_position[active] + t)
        return tokens, logps, completion_mask

    def get_per_token_logps(self, prompts, num_verdicts, tokens, completion_mask):
        """log pi of every token, with gradients: tokens, completion_mask (R, T) -> (R, T).

        The result is 0 outside the completion mask. Each token is predicted from the hidden state
        at the token before it:

            hidden state at  last of the prompt    token 0    token 1    ...    token T-2
            predicts         token 0               token 1    token 2    ...    token T-1
        """
        prefix = self.prefill(prompts, num_verdicts)
        hidden = prefix.last_hidden                                         # (R, 1, H)
        num_inputs = tokens.shape[1] - 1                                    # T - 1
        if num_inputs > 0:
            verdict_mask = completion_mask[:, :-1].long()                   # (R, T - 1)
            attention_mask = torch.cat([prefix.attention_mask, verdict_mask], dim=1)
            position = prefix.next_position + torch.arange(num_inputs, device=tokens.device)
            verdict_hidden = self.run_tokens(
                prefix.cache, tokens[:, :-1], attention_mask, position)
            hidden = torch.cat([hidden, verdict_hidden], dim=1)             # (R, T, H)

        # The lm_head runs only on the M tokens inside the mask, in checkpointed chunks. The (M, V)
        # table of logits is then never in memory as a whole.
        hidden = hidden[completion_mask]                                    # (M, H)
        targets = tokens[completion_mask]                                   # (M,)
        chunks = []
        for start in range(0, len(targets), LM_HEAD_CHUNK):
            chunk = slice(start, start + LM_HEAD_CHUNK)
            chunks.append(checkpoint(
                self.token_logps, hidden[chunk], targets[chunk], use_reentrant=False))
        logps = torch.zeros(tokens.shape, device=tokens.device)             # (R, T)
        logps[completion_mask] = torch.cat(chunks)
        return logps


def load_policy(folder, device, world_size):
    """The policy with fp32 weights, sharded by FSDP2 if there are several ranks.

    It stays in eval mode (no dropout), so sampling and update see the same model.
    """
    vlm, processor = load_trainable_vlm(folder, device, world_size)
    policy = Policy(vlm, processor)
    if world_size > 1:
        blocks = [*vlm.model.language_model.layers, *vlm.model.visual.blocks]
        shard_model(policy, blocks, device)
        # FSDP2 gathers the weights outside the blocks (the embedding, the last norm, the lm_head)
        # only in registered methods. So the rest of the script calls only these two.
        register_fsdp_forward_method(policy, "sample")
        register_fsdp_forward_method(policy, "get_per_token_logps")
    return policy


# ------------------------------------------------------------ the phases of a training step

@dataclass
class Rollout:
    """The verdicts on the E = 2B edits of B pairs. Verdict k on edit e is row e N + k."""
    prompts: list                       # E prompts
    tokens: torch.Tensor                # (R, T), T = the longest verdict
    logps: torch.Tensor                 # (R, T), only for the metric rollout_logp_diff
    completion_mask: torch.Tensor       # (R, T) bool, True on the tokens of a verdict
    truncated_rate: float               # the share of verdicts without an end token
    texts: list                         # R texts
    scores: torch.Tensor                # (B, 2, N) on the CPU: chosen, rejected; NaN = not parsed


def build_prompts(path, pair):
    """The two prompts of a pair: on its chosen edit and on its rejected edit."""
    source = open_image(path, pair, "source")
    prompts = []
    for side in ("chosen", "rejected"):
        edit = open_image(path, pair, side)
        prompts.append(verdict_chat(source, edit, pair["instruction"], pair["principles"]))
    return prompts


def draw_uniforms(pairs, seed_key, args):
    """Random numbers for R verdicts, in the order of the rows: (R, --max_new_tokens).

    `seed_key` is the training step, or "held out" for an evaluation. Every verdict has its own
    seed, so its text does not depend on the batch, the number of ranks or a restart (but for
    rounding in bf16).
    """
    uniforms = []
    for pair in pairs:
        for side in ("chosen", "rejected"):
            for k in range(args.group_size):
                seed = derive_seed(args.seed, seed_key, pair["id"], side, k)
                uniforms.append(uniform_numbers(seed, args.max_new_tokens))
    return torch.stack(uniforms)


def generate_rollout(policy, pairs, seed_key, args):
    """Write N verdicts on both edits of every pair, in bf16 on a GPU, and read their scores."""
    n = args.group_size
    device = policy.vlm.device
    prompts = []
    for pair in pairs:
        prompts.extend(build_prompts(args.pairs, pair))
    uniforms = draw_uniforms(pairs, seed_key, args)                 # (R, --max_new_tokens)
    tokens = torch.zeros(uniforms.shape, dtype=torch.long, device=device)
    logps = torch.zeros(uniforms.shape, device=device)
    completion_mask = torch.zeros(uniforms.shape, dtype=torch.bool, device=device)
    for start in range(0, len(prompts), args.rollout_batch_size):
        batch = prompts[start:start + args.rollout_batch_size]
        rows = slice(start * n, (start + len(batch)) * n)
        # Ranks may stop at different lengths: FSDP2 keeps weights gathered until a backward pass.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            sampled = policy.sample(batch, n, uniforms[rows])
            tokens[rows], logps[rows], completion_mask[rows] = sampled
    if not logps.isfinite().all():
        raise SystemExit(f"rollout {seed_key}: the policy's log-probs are not finite. The weights "
                         "have diverged. Start again with a lower --lr.")

    lengths = completion_mask.sum(1)                                        # (R,)
    longest = int(lengths.max())
    last_tokens = tokens.gather(1, lengths[:, None] - 1)                    # (R, 1)
    is_truncated = ~torch.isin(last_tokens, policy.eos_token_ids)
    tokens = tokens[:, :longest]
    texts = policy.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return Rollout(
        prompts=prompts, tokens=tokens, logps=logps[:, :longest],
        completion_mask=completion_mask[:, :longest],
        truncated_rate=is_truncated.float().mean().item(),
        texts=texts, scores=read_scores(texts, pairs, n))


def read_scores(texts, pairs, n):
    """The scores parsed from R texts: (B, 2, N), NaN for a verdict that cannot be parsed.

    Only the score is used here; the answers to the questions just have to be well-formed.
    """
    scores = torch.full((len(texts),), math.nan)                            # (R,)
    for row, text in enumerate(texts):
        pair = pairs[row // (2 * n)]
        verdict = parse_verdict(text, len(pair["principles"]))
        if verdict is not None:
            scores[row] = verdict.score
    return scores.view(len(pairs), 2, n)


def compute_rewards(scores):
    """The win ratio of every verdict, in the order of the prompts: (B, 2, N) -> (E, N)."""
    chosen_rewards, rejected_rewards = win_ratios(scores[:, 0], scores[:, 1])       # (B, N) each
    return torch.stack([chosen_rewards, rejected_rewards], dim=1).flatten(0, 1)


@dataclass
class MicroBatch:
    """Some edits for one forward and backward pass, with N verdicts (rows) on each."""
    prompts: list
    tokens: torch.Tensor                # (rows, T), T = the longest of these verdicts
    completion_mask: torch.Tensor       # (rows, T)
    rollout_logps: torch.Tensor         # (rows, T)
    advantage: torch.Tensor             # (rows,)
    is_dummy: bool                      # it runs, but its loss has weight 0


def make_micro_batch(rollout, advantage, edits, is_dummy=False):
    """The rows of these edits, cut to their longest verdict; advantage (E, N)."""
    n = advantage.shape[1]
    rows = torch.tensor([e * n + k for e in edits for k in range(n)], device=rollout.tokens.device)
    mask = rollout.completion_mask[rows]
    longest = int(mask.sum(1).max())
    return MicroBatch(
        prompts=[rollout.prompts[e] for e in edits], tokens=rollout.tokens[rows, :longest],
        completion_mask=mask[:, :longest], rollout_logps=rollout.logps[rows, :longest],
        advantage=advantage[edits].flatten().to(rows.device), is_dummy=is_dummy)


def make_micro_batches(rollout, rewards, advantage, size):
    """Cut all edits but zero-variance groups into micro-batches of at most `size` edits."""
    edits = (~is_zero_variance(rewards)).nonzero()[:, 0].tolist()
    micro_batches = []
    for start in range(0, len(edits), size):
        micro_batches.append(make_micro_batch(rollout, advantage, edits[start:start + size]))
    # Under FSDP2 every backward pass is a collective, so all ranks must run equally many. A rank
    # with fewer micro-batches adds dummies, on its edit 0.
    passes_per_rank = all_gather_lists([len(micro_batches)])
    while len(micro_batches) < max(passes_per_rank):
        micro_batches.append(make_micro_batch(rollout, advantage, [0], is_dummy=True))
    return micro_batches


def update_policy(policy, optimizer, micro_batches, step, world_size, args):
    """Take one optimizer step per epoch over the rollout; return metrics of this rank.

    The loss is the mean over the groups of all ranks; a zero-variance group counts as 0. So the
    loss of a micro-batch has the weight (its groups) / (all groups). FSDP2 averages the gradients
    of the ranks where we want their sum: hence `* world_size`. Example with 2 ranks and 4 groups:
    rank 0 trains on 2 groups with mean loss a, rank 1 on 1 group with loss b, and the 4th group has
    zero variance. (a * 2/4 * 2 + b * 1/4 * 2) / 2 = (2a + b) / 4.
    """
    device = policy.vlm.device
    params = optimizer.param_groups[0]["params"]
    total_groups = 2 * args.pairs_per_step                                  # one for each edit
    # The learning rate: a linear warm-up, then constant.
    optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup_steps))
    old_logps = []                      # log pi_old (rows, T) of each micro-batch
    logp_diffs = []                     # |log-prob in the rollout - in the update|
    is_clipped = []                     # is a token's rho outside the clip?
    for epoch in range(args.update_epochs):
        for i, batch in enumerate(micro_batches):
            mask = batch.completion_mask
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logps = policy.get_per_token_logps(
                    batch.prompts, args.group_size, batch.tokens, mask)     # (rows, T)
            if epoch == 0:
                # No step is taken yet, so this is pi_old. (The rollout's log-probs differ in bf16.)
                old_logps.append(logps.detach())
                if not batch.is_dummy:
                    logp_diffs.append((logps.detach() - batch.rollout_logps)[mask].abs())
            loss = clipped_loss(logps, old_logps[i], batch.advantage, mask, args.clip_eps)
            weight = 0 if batch.is_dummy else len(batch.prompts) / total_groups
            (loss * weight * world_size).backward()

            if not batch.is_dummy:
                ratio = (logps.detach() - old_logps[i])[mask].exp()
                is_clipped.append(clip_ratio(ratio, args.clip_eps) != ratio)
        grad_norm = clip_gradients(params, step)
        optimizer.step()
        optimizer.zero_grad()
    # grad_norm is of the last epoch, before clipping. The other two stay 0 if every group of this
    # rank has zero variance.
    metrics = dict(grad_norm=grad_norm, rollout_logp_diff=0.0, clip_fraction=0.0)
    if logp_diffs:
        metrics["rollout_logp_diff"] = torch.cat(logp_diffs).mean().item()
        metrics["clip_fraction"] = torch.cat(is_clipped).float().mean().item()
    return metrics


def score_metrics(scores):
    """Metrics from the scores (B, 2, N) of the pairs of all ranks."""
    chosen = scores[:, 0, :, None]                                          # (B, N, 1)
    rejected = scores[:, 1, None, :]                                        # (B, 1, N)
    zero_variance = is_zero_variance(compute_rewards(scores))               # (E,)
    return dict(
        # Shares of all N x N comparisons. A tie or an unparsed verdict is not ranked correctly.
        pair_accuracy=(chosen > rejected).float().mean().item(),
        tie_rate=(chosen == rejected).float().mean().item(),
        parse_rate=(~scores.isnan()).float().mean().item(),
        chosen_score=chosen.nanmean().item(),
        rejected_score=rejected.nanmean().item(),
        frac_reward_zero_std=zero_variance.float().mean().item())           # TRL's name


def save_policy(run, step, policy, optimizer, rank):
    """Save the checkpoint for --resume, and then the model for the next stages.

    In this order: under FSDP2 a rollout leaves the weights outside the blocks gathered, and
    save_model needs them sharded. Only a state dict of the whole policy shards them again.
    """
    save_checkpoint(run, step, policy, optimizer, rank)
    save_model(policy.vlm, policy.processor, run.out / "model", rank)


def evaluate(policy, eval_pairs, step, run, rank, world_size, args):
    """Judge the evaluation pairs, with the same random numbers every time; save the verdicts."""
    n = args.group_size
    pairs = eval_pairs[rank::world_size]
    rollout = generate_rollout(policy, pairs, "held out", args)
    rows = []
    for b, pair in enumerate(pairs):
        row = {"id": pair["id"]}
        for i, side in enumerate(("chosen", "rejected")):
            scores = rollout.scores[b, i].tolist()
            first = (2 * b + i) * n                                         # first row of the edit
            row[f"{side}_scores"] = [None if math.isnan(score) else score for score in scores]
            row[f"{side}_texts"] = rollout.texts[first:first + n]
        rows.append(row)
    all_rows = all_gather_lists(rows)                                       # of all ranks
    all_scores = torch.tensor(all_gather_lists(rollout.scores.tolist()))    # (num_eval, 2, N)
    if rank == 0:
        all_rows.sort(key=lambda row: row["id"])
        write_jsonl(run.out / "samples" / f"step_{step:06d}.jsonl", all_rows)
        metrics = score_metrics(all_scores)
        log_step(run, step, dict(
            eval_pair_accuracy=metrics["pair_accuracy"], eval_tie_rate=metrics["tie_rate"],
            eval_parse_rate=metrics["parse_rate"]))


def load_preferences(args, rank, world_size):
    """Read and check the pairs: (train_pairs, eval_pairs)."""
    fields = ("source", "instruction", "principles", "chosen", "rejected")
    pairs = load_jsonl(args.pairs, fields, "It holds human preferences (README, stage 4).")
    train_pairs, eval_pairs = split_by_source(pairs, args.num_eval)
    if len(train_pairs) < args.pairs_per_step:
        raise SystemExit(f"{args.pairs}: only {len(train_pairs)} of {len(pairs)} pairs are left to "
                         "train on. Choose a lower --num_eval or --pairs_per_step.")
    if args.pairs_per_step < world_size or 0 < len(eval_pairs) < world_size:
        raise SystemExit(f"--pairs_per_step and --num_eval must be at least {world_size}, a pair "
                         "for every rank (--num_eval may also be 0).")
    check_images(args.pairs, pairs, ("source", "chosen", "rejected"), rank, world_size)
    return train_pairs, eval_pairs


def main():
    args = parse_args()
    rank, world_size, device = setup()
    train_pairs, eval_pairs = load_preferences(args, rank, world_size)
    policy = load_policy(args.model, device, world_size)
    params = [param for param in policy.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=0)
    run = start_run(vars(args), args.steps, policy, optimizer, rank)

    for step in range(run.start_step, args.steps):
        # ---- 1. Every --eval_every steps: save everything, then judge the evaluation pairs.
        if step % args.eval_every == 0:
            if step > run.start_step:                       # at the first step nothing is new
                save_policy(run, step, policy, optimizer, rank)
            if eval_pairs:
                evaluate(policy, eval_pairs, step, run, rank, world_size, args)

        # ---- 2. Rollout: N verdicts on both edits of this rank's pairs.
        indices = batch_indices(len(train_pairs), args.pairs_per_step, args.seed, step)
        pairs = [train_pairs[i] for i in indices[rank::world_size]]
        rollout = generate_rollout(policy, pairs, step, args)
        all_scores = torch.tensor(all_gather_lists(rollout.scores.tolist()))    # of all ranks
        if all_scores.isnan().all():
            raise SystemExit(f"step {step}: no verdict can be parsed ({rollout.truncated_rate:.0%} "
                             "of rank 0's have no end token). Start again with more "
                             "--max_new_tokens, a lower --lr, or a longer train_sft.py.")

        # ---- 3. Rewards, advantages, and micro-batches without the zero-variance groups.
        rewards = compute_rewards(rollout.scores)                           # (E, N)
        advantage = advantages(rewards)                                     # (E, N)
        micro_batches = make_micro_batches(rollout, rewards, advantage, args.micro_batch_size)

        # ---- 4. Update: one optimizer step per epoch over the rollout.
        update_metrics = update_policy(
            policy, optimizer, micro_batches, step, world_size, args)

        # ---- 5. Log. Score metrics cover all ranks, token-level metrics rank 0 only.
        if rank == 0:
            metrics = score_metrics(all_scores)
            lengths = rollout.completion_mask.sum(1)
            metrics["completion_length"] = lengths.float().mean().item()
            metrics["truncated_rate"] = rollout.truncated_rate
            log_step(run, step, metrics | update_metrics)

    # ---- 6. Save the last checkpoint and the model, and judge the evaluation pairs once more.
    save_policy(run, args.steps, policy, optimizer, rank)
    if eval_pairs:
        evaluate(policy, eval_pairs, args.steps, run, rank, world_size, args)
    cleanup()


# ------------------------------------------------------------ helpers
#
# Skip these at a first reading. They are the same in every script that needs them.

def setup():
    """Join the process group that torchrun has set up: (rank, world_size, device)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # cuDNN's attention has wrong gradients on Hopper: github.com/pytorch/pytorch/issues/196678
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "RANK" not in os.environ:
        return 0, 1, device
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Ranks may wait for hours while one of them saves a checkpoint or waits for a slow server.
    dist.init_process_group(backend, timeout=timedelta(days=1))
    return dist.get_rank(), dist.get_world_size(), device


def barrier():
    """Wait until all ranks get here."""
    if dist.is_initialized():
        dist.barrier()


def all_gather_lists(items):
    """The lists of all ranks, joined in rank order, on every rank."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def cleanup():
    """Leave the process group together."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def derive_seed(*key):
    """A separate 32-bit seed for each key, such as (seed, row id, ...)."""
    key_bytes = list(repr(key).encode())
    return int(np.random.SeedSequence(key_bytes).generate_state(1)[0])


def uniform_numbers(seed, length):
    """`length` random numbers in [0, 1), one for each token that a VLM will sample."""
    numbers = np.random.default_rng(seed).random(length)
    return torch.tensor(numbers, dtype=torch.float32).clamp(max=1 - 1e-7)


def sample_by_inverse_cdf(log_probs, uniforms):
    """One token per row, chosen by the row's own random number: (R, V), (R,) -> (R,).

    It is the first token whose cumulative probability exceeds the number. Unlike with
    torch.multinomial, a row's token does not depend on the other rows of the batch.
    """
    cdf = log_probs.exp().cumsum(-1)                                        # (R, V)
    total = cdf[:, -1:]                                                     # 1 up to rounding
    return (cdf <= uniforms[:, None] * total).sum(-1)


def load_jsonl(path, fields, hint):
    """Read the rows of a JSONL file. A bad line ends the run, with its number and the reason."""
    try:
        lines = Path(path).read_bytes().splitlines()        # str.splitlines also cuts at U+2028
    except OSError as error:
        raise SystemExit(f"{path} cannot be read: {error}. {hint}")
    if not lines:
        raise SystemExit(f"{path} is empty. {hint}")
    rows = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            for field in ("id", *fields):
                if field not in row:
                    raise ValueError(f"the field {field!r} is missing")
            row["id"] = str(row["id"])
            if row["id"] in rows:
                raise ValueError(f"the id {row['id']!r} occurs twice")
            for principle in row.get("principles", []):
                if not {"question", "category"} <= set(principle):
                    raise ValueError(f"the principle {principle} lacks a question or a category")
            text = json.dumps([row.get("instruction"), row.get("principles")], ensure_ascii=False)
            if "<|" in text:
                raise ValueError("the text contains '<|', the start of a special token")
            text.encode()                   # fails if there is a lone surrogate
        except (ValueError, TypeError) as error:
            raise SystemExit(f"{path}, line {number}: {error}. Fix or delete this line. {hint}")
        rows[row["id"]] = row
    return list(rows.values())


MAX_PIXELS = 512 * 28 * 28                  # 512 visual tokens of Qwen2.5-VL, each 28 x 28 pixels


def shrink(image, max_pixels=MAX_PIXELS):
    """A copy with at most max_pixels, in the same aspect ratio; it is never enlarged."""
    scale = math.sqrt(max_pixels / (image.width * image.height))
    small = image.copy()
    small.thumbnail((image.width * scale, image.height * scale))
    return small


def open_image(jsonl_path, row, field, max_pixels=MAX_PIXELS):
    """The image row[field] of a JSONL file as RGB: upright, on white, at most max_pixels.

    Raises OSError with the row and the reason, whatever is wrong with the file.
    """
    try:
        image = Image.open(Path(jsonl_path).parent / row[field])
        image.load()
        image.getexif()                     # Pillow reads the orientation and keeps it.
        image.info.pop("exif", None)        # exif_transpose would fail on other, damaged values.
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            raise OSError("it has more than 8 bits per channel")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = shrink(Image.alpha_composite(white, image).convert("RGB"), max_pixels)
        if max(image.size) > 200 * min(image.size):
            raise OSError("its aspect ratio is above 200, which Qwen-VL refuses")
    except Exception as error:              # Pillow raises more kinds of errors than one can list.
        raise OSError(f"{jsonl_path}, row {row['id']}: the {field} image {row[field]} cannot be "
                      f"used: {error!r}. Replace the image or delete the row.")
    return image


def check_images(jsonl_path, rows, fields, rank, world_size):
    """Open the images of up to 5,000 rows now, so that a bad one does not stop the run later."""
    def check(row):
        for field in fields:
            open_image(jsonl_path, row, field)

    sample = rows[::1 + len(rows) // 5000]
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(check, sample[rank::world_size]))
    except OSError as error:
        raise SystemExit(error)


def write_jsonl(path, rows):
    """Write atomically: a temporary file, which then replaces the old one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def append_jsonl(path, row):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def load_vlm(folder, device, dtype):
    """Load a Qwen2.5-VL or Qwen3-VL from a local folder or hub id: (model, Processor)."""
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, output_loading_info=True)
        processor = Processor(folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} is not a Qwen2.5-VL or Qwen3-VL: {error}")
    if info["missing_keys"]:                # transformers would fill them with random numbers
        raise SystemExit(f"{folder} lacks the weights {sorted(info['missing_keys'])[:3]} ...")
    # For whatever is not specified, `generate` and servers fall back to generation_config.json, for
    # example to Qwen2.5-VL's repetition penalty of 1.05. We leave only the end tokens in it.
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=processor.eos_token_ids, pad_token_id=processor.tokenizer.pad_token_id)
    return model.to(device).eval(), processor


class Processor:
    """Turn chats with images into left-padded model inputs. (AutoProcessor needs torchvision.)"""

    def __init__(self, folder):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.image_processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.suppress_tokens = self.tokenizer.convert_tokens_to_ids(
            ["<|image_pad|>", "<|video_pad|>"])             # no image would stand behind them
        self.eos_token_ids = [                              # each of them ends a reply
            self.tokenizer.eos_token_id, self.tokenizer.pad_token_id]

    def __call__(self, chats):
        texts = self.tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True)
        images = []
        for chat in chats:
            for part in chat[0]["content"]:
                if part["type"] == "image":
                    images.append(part["image"])
        return tokenize_with_images(self.tokenizer, self.image_processor, texts, images)


def tokenize_with_images(tokenizer, image_processor, texts, images):
    """Tokenize texts in which each <|image_pad|> stands for the next of the images.

    The model needs one placeholder for every token of an image, so each placeholder is repeated.
    """
    inputs = image_processor(images, return_tensors="pt")
    patches = inputs["image_grid_thw"].prod(-1)             # frames x height x width of each image
    tokens_per_image = iter((patches // image_processor.merge_size ** 2).tolist())
    expanded_texts = []
    for text in texts:
        pieces = text.split("<|image_pad|>")
        expanded = pieces[0]
        for piece in pieces[1:]:
            expanded += "<|image_pad|>" * next(tokens_per_image) + piece
        expanded_texts.append(expanded)
    inputs.update(tokenizer(expanded_texts, return_tensors="pt", padding=True))
    image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    # Without this the model would silently give images the positions of text.
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token_id).int()
    return inputs


def load_trainable_vlm(folder, device, world_size):
    """Load a VLM to train: (model, Processor), with fp32 weights and a frozen vision tower.

    On several ranks it stays on the CPU, from where FSDP2 takes each rank's share.
    """
    model, processor = load_vlm(folder, "cpu" if world_size > 1 else device, torch.float32)
    model.model.visual.requires_grad_(False)
    if device.type == "cuda":
        # transformers' own gradient checkpointing works in train mode only, without a KV cache.
        for layer in model.model.language_model.layers:
            layer.mlp.forward = partial(checkpointed, layer.mlp.forward)
    return model, processor


def checkpointed(forward, hidden):
    """forward(hidden), recomputed in the backward pass: MLPs hold most of the activations."""
    if not torch.is_grad_enabled():
        return forward(hidden)
    return checkpoint(forward, hidden, use_reentrant=False)


def shard_model(model, blocks, device):
    """Shard a model with FSDP2: every block on its own, and all other weights together.

    Each rank stores its share of the weights and of AdamW's moments. After a block's first forward
    pass its weights stay gathered until its next backward pass. So ranks can generate texts, or run
    different numbers of forward passes, without waiting for each other.
    """
    param_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    mp_policy = MixedPrecisionPolicy(
        param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in [*blocks, model]:
        fully_shard(module, mp_policy=mp_policy, reshard_after_forward=False)


def split_by_source(rows, num_eval):
    """(train_rows, eval_rows): the last rows, whose source images are not trained on at all."""
    eval_rows = rows[max(0, len(rows) - num_eval):]
    eval_sources = {row["source"] for row in eval_rows}
    train_rows = [row for row in rows if row["source"] not in eval_sources]
    return train_rows, eval_rows


def clip_gradients(params, step):
    """Scale the gradients to a norm of at most 1; return the norm from before."""
    grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()                 # over the shards of all ranks
    grad_norm = grad_norm.item()
    if not math.isfinite(grad_norm):
        raise SystemExit(f"step {step}: the gradient norm is {grad_norm}. Start again with a lower "
                         "--lr.")
    return grad_norm


def batch_indices(num_rows, batch_size, seed, step):
    """The row indices of one step. Each epoch is a new permutation, cut into whole batches."""
    batches_per_epoch = num_rows // batch_size
    epoch = step // batches_per_epoch
    batch = step % batches_per_epoch
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    return order[batch * batch_size:(batch + 1) * batch_size].tolist()


@dataclass
class Run:
    """What logging and checkpoints need to know about a run."""
    out: Path
    start_step: int
    num_steps: int
    start_time: float


# A resumed run may change these flags: they do not change what a step computes. One list for all
# scripts.
MAY_CHANGE = ["out", "resume", "toy", "steps", "eval_every", "served_model",
              "micro_batch_size", "rollout_batch_size", "reward_batch_size"]
CHECKPOINT_OPTIONS = dcp.StateDictOptions(                  # one file, whatever the number of ranks
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def start_run(settings, num_steps, model, optimizer, rank):
    """Start a run in --out, or resume it from its checkpoint. `settings` are its flags by name."""
    out = Path(settings["out"])
    config_path = out / "config.json"
    metrics_path = out / "metrics.jsonl"
    checkpoint_path = out / "checkpoint.pt"
    if not settings["resume"] and (metrics_path.exists() or checkpoint_path.exists()):
        raise SystemExit(f"{out} holds an earlier run. Add --resume or choose another --out.")
    if settings["resume"] and config_path.exists():
        old_settings = json.loads(config_path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if name not in MAY_CHANGE and value != old_settings.get(name):
                raise SystemExit(f"{out} was begun with --{name} {old_settings.get(name)}, not "
                                 f"{value}. Use the old value or another --out.")
    start_step = 0
    metrics_size = 0
    if checkpoint_path.exists():
        saved = torch.load(checkpoint_path, weights_only=True, mmap=True)
        start_step = saved["step"]
        metrics_size = saved["metrics_size"]
        dcp.set_model_state_dict(model, saved["model"], options=CHECKPOINT_OPTIONS)
        if saved["optimizer"]:
            dcp.set_optimizer_state_dict(
                model, optimizer, saved["optimizer"], options=CHECKPOINT_OPTIONS)
    barrier()                                               # until here every rank only reads
    if rank == 0:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        config_path.with_suffix(".tmp").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        os.replace(config_path.with_suffix(".tmp"), config_path)
        with open(metrics_path, "ab") as file:
            file.truncate(metrics_size)                     # drop what came after the checkpoint
    return Run(out, start_step, num_steps, time.time())


def save_checkpoint(run, step, model, optimizer, rank):
    """Save all that --resume needs: a temporary file, which then replaces the old checkpoint."""
    weights = dcp.get_model_state_dict(model, options=CHECKPOINT_OPTIONS)   # all ranks take part
    moments = {}
    # Before the first optimizer step there is no state, and asking for it would invent a step.
    if optimizer.state:
        moments = dcp.get_optimizer_state_dict(model, optimizer, options=CHECKPOINT_OPTIONS)
    if rank == 0:
        metrics_size = os.path.getsize(run.out / "metrics.jsonl")
        torch.save(dict(step=step, metrics_size=metrics_size, model=weights, optimizer=moments),
                   run.out / "checkpoint.tmp")
        os.replace(run.out / "checkpoint.tmp", run.out / "checkpoint.pt")


def save_model(model, processor, folder, rank):
    """Save a Hugging Face folder in fp32, since bf16 would round small updates away."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp.get_model_state_dict(model, options=options)                # all ranks take part
    if rank == 0:
        # A tied weight appears twice in the state dict, but once among the parameters.
        state = {name: state[name] for name, _ in model.named_parameters()}
        temporary = folder.with_name(folder.name + ".tmp")
        model.save_pretrained(temporary, state_dict=state)
        processor.tokenizer.save_pretrained(temporary)
        processor.image_processor.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)


def log_step(run, step, metrics):
    """Print one line and append one row to metrics.jsonl, in which NaN is null."""
    seconds_per_step = (time.time() - run.start_time) / (step - run.start_step + 1)
    minutes_left = seconds_per_step * max(0, run.num_steps - step - 1) / 60
    numbers = " | ".join(f"{name} {value:.3g}" for name, value in metrics.items())
    print(f"step {step:4d}/{run.num_steps} | {numbers} | eta {minutes_left:.1f} min", flush=True)
    row = {"step": step}
    for name, value in metrics.items():
        row[name] = value if math.isfinite(value) else None
    append_jsonl(run.out / "metrics.jsonl", row)


if __name__ == "__main__":
    main()

"""Stage 5 of 6: Flow-GRPO for an image editor, taught by the reasoning reward model (RRM) alone.

An editor follows dx = v dσ from noise (σ = 1) to a picture (σ = 0). A policy gradient needs chance,
so in a few early steps the ODE gives way to an SDE, whose step is a Gaussian and so has a
probability (Flow-GRPO, arXiv 2505.05470; from σ to σ', dt = σ' - σ < 0, a = --noise_level):

    s      = a √(σ / (1 - σ))    mean = x + v dt + s²/(2σ) (x + (1 - σ) v) dt    std = s √-dt
    A_i    = (τ_i - mean τ) / (std τ + 1e-4)    τ_i: the RRM's score of edit i = 1..G of one prompt
    r_i,t  = π(x' | x) / π_old(x' | x)          log π: mean over the latent's dimensions, as theirs
    KL_i,t = (mean - mean_base)² / (2 std²)     exact for one std, again a mean; base = the LoRA off
    loss   = mean over i, t of  max(-A_i r_i,t, -A_i clip(r_i,t, 1 - ε, 1 + ε)) + β KL_i,t

    principles.jsonl {id, source, instruction, principles}
      -> P prompts -> G edits of each: W steps of the SDE, the others of the ODE
      -> one greedy verdict an edit -> A -> updates of the LoRA
      -> out/lora (for pipe.load_lora_weights), metrics.jsonl, samples/step_* (held-out prompts)

Shapes: P prompts a step, G edits of a prompt, B of them a batch, S latent tokens of C numbers.

    python train_flow_grpo.py --toy --prompts principles.jsonl \
        --editor toy/models/editor --reward rl/model --out flow
    torchrun --nproc-per-node=8 train_flow_grpo.py --prompts principles.jsonl \
        --editor black-forest-labs/FLUX.1-Kontext-dev --reward http://host:8000/v1 --out flow

Against the paper: it prints G = 24 and β = 0.04, no more. P, lr, ε, the LoRA, the schedule and two
updates a step are Flow-GRPO's Kontext recipe. (1) The released KL lacks |dt|, which makes it 7 to
10 times weaker on this schedule; ours is exact, so 0.004 stands for their 0.04. (2) Noise only in W
steps of the first half, drawn anew for every training step and shared by all edits, so that none of
a group is noisier. (3) fp32 latents and log-probs. (4) Unreadable verdicts are left out of their
group; edits with A = 0 are skipped; A is not clipped. (5) No EMA, constant lr. (6) Qwen-Image-Edit,
with true guidance in rollout and update; any aspect ratio, about size² pixels. As in the public
code, the log-ratio is a mean over some 65,000 dimensions and biased by minus half its variance, so
that ε clips mostly A < 0; and the SDE has the ODE's marginals only for dt -> 0: a step leaves some
percent too much noise (CPS none).

What to change for ... another editor: its words in a function beside `kontext_words`, its VAE in
`read_prompts` and `decode`. Another reward: `score_edits`. Pref-GRPO's win rates, or a std over the
whole step: `group_advantages`.
"""
import argparse, base64, io, json, math, os, re, shutil, sys, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import InferenceClient
from PIL import Image, ImageOps
from torch import nn
from torch.distributed.checkpoint import state_dict as states

TOY = dict(held_out=48, prompts_per_step=16, group_size=12, size=32, max_new=128, steps=50,
           updates=4, lr=1e-3, clip_eps=1e-3, beta=0.2, lora_rank=16, micro=48, every=10)


def parse_args():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--toy", action="store_true", help=f"small enough for a CPU: {TOY}")
    # the files
    flags.add_argument("--prompts", required=True, help="principles.jsonl of decompose.py")
    flags.add_argument("--editor", required=True, help="FLUX.1-Kontext, Qwen-Image-Edit (-Plus)")
    flags.add_argument("--reward", required=True, help="the RRM: folder, hub id or URL")
    flags.add_argument("--out", required=True, help="folder for lora/, metrics.jsonl, samples/")
    flags.add_argument("--held_out", type=int, default=8, help="last prompts, only looked at")
    # the edits
    flags.add_argument("--prompts_per_step", type=int, default=48, help="P, over all GPUs")
    flags.add_argument("--group_size", type=int, default=24, help="G, edits a prompt (the paper's)")
    flags.add_argument("--num_steps", type=int, default=6, help="denoising steps; inference has 28")
    flags.add_argument("--size", type=int, default=512, help="of the square of a picture's area")
    flags.add_argument("--guidance", type=float, default=0, help="0: 2.5 for Kontext, 4 for Qwen")
    flags.add_argument("--sampler", default="sde", choices=("sde", "cps"), help="Flow-GRPO, -CPS")
    flags.add_argument("--noise_level", type=float, default=0.7, help="a; 0.8 for cps")
    flags.add_argument("--sde_window", type=int, default=2, help="W, noisy steps in the first half")
    flags.add_argument("--max_new", type=int, default=1024, help="longest verdict in tokens")
    # the updates
    flags.add_argument("--steps", type=int, default=300, help="training steps")
    flags.add_argument("--updates", type=int, default=2, help="a step, each on a share of prompts")
    flags.add_argument("--lr", type=float, default=3e-4, help="AdamW, constant")
    flags.add_argument("--clip_eps", type=float, default=1e-4, help="ε, on the ratio per dimension")
    flags.add_argument("--beta", type=float, default=0.004, help="β of the KL to the base editor")
    flags.add_argument("--lora_rank", type=int, default=64, help="r; alpha is 2 r")
    # the run
    flags.add_argument("--micro", type=int, default=12, help="edits of a prompt at once, per GPU")
    flags.add_argument("--every", type=int, default=20, help="steps between looks, and states")
    flags.add_argument("--seed", type=int, default=0, help="of everything random")
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

def gaussian_step(mean, std, noise, x_next):
    """x_next ~ N(mean, std²), or as given; log-prob: the mean over its dimensions, 0 at std 0."""
    if x_next is None:
        x_next = mean if noise is None else mean + std * noise
    density = -((x_next.float() - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2
    return x_next, torch.where(std > 0, density, 0).flatten(1).mean(1), mean, std


def sde_step(x, velocity, sigma, sigma_next, noise_level, noise=None, x_next=None):
    """Flow-GRPO's step: the ODE's marginals, with noise. noise_level 0 is the ODE's Euler step.

    -> x_next, log-prob (B,), mean, std with √-dt in it. At σ = 1, where s = ∞, σ' stands in.
    """
    x, velocity = x.float(), velocity.float()
    sigma, sigma_next = (torch.as_tensor(s, device=x.device).float() for s in (sigma, sigma_next))
    dt = sigma_next - sigma
    s = noise_level * (sigma / (1 - torch.where(sigma == 1, sigma_next, sigma))).sqrt()
    mean = x + velocity * dt + s ** 2 / (2 * sigma) * (x + (1 - sigma) * velocity) * dt
    return gaussian_step(mean, s * (-dt).sqrt(), noise, x_next)


def cps_step(x, velocity, sigma, sigma_next, noise_level, noise=None, x_next=None):
    """Flow-CPS's step (arXiv 2509.05952): new noise for part of the old, so that σ' is exact.

    x0 = x - σ v, x1 = x + (1 - σ) v, std = s = σ' sin(a π/2), mean = (1 - σ') x0 + √(σ'² - s²) x1
    """
    x, velocity = x.float(), velocity.float()
    sigma, sigma_next = (torch.as_tensor(s, device=x.device).float() for s in (sigma, sigma_next))
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    x0, x1 = x - sigma * velocity, x + (1 - sigma) * velocity
    mean = (1 - sigma_next) * x0 + (sigma_next ** 2 - std ** 2).sqrt() * x1
    return gaussian_step(mean, std, noise, x_next)


SAMPLERS = dict(sde=sde_step, cps=cps_step)


def group_advantages(rewards, eps=1e-4):
    """A = (τ - mean τ) / (std τ + eps) in each row of (P, G); NaN takes no part; NaN, equal: 0."""
    parsed = ~rewards.isnan()
    num_parsed = parsed.sum(1, keepdim=True).clamp(min=1)
    mean = rewards.nansum(1, keepdim=True) / num_parsed
    centred = torch.where(parsed, rewards - mean, 0)
    std = (centred.square().sum(1, keepdim=True) / num_parsed).sqrt()
    highest = rewards.nan_to_num(nan=-math.inf).amax(1, keepdim=True)
    lowest = rewards.nan_to_num(nan=math.inf).amin(1, keepdim=True)
    return torch.where(parsed & (highest > lowest), centred / (std + eps), 0)


def clipped_surrogate(logp, old_logp, advantage, clip_eps):
    """max(-A r, -A clip(r)) and the ratio r of every noisy step: (B,) each."""
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio.detach()


# ---------------------------------------------------------------- the editor

GUIDANCE = dict(FluxKontextPipeline=2.5, QwenImageEditPipeline=4.0, QwenImageEditPlusPipeline=4.0)
LORA_LAYERS = r"(single_)?transformer_blocks\.\d+\.(attn|ff\w*|\w+_mlp)\b.*"


def resized(picture, side):
    """The picture in its own aspect with about side² pixels, both sides multiples of 32."""
    stretch = side / 32 / math.sqrt(math.prod(picture.size))
    return picture.resize([32 * max(1, round(stretch * n)) for n in picture.size], Image.LANCZOS)


@torch.no_grad()
def read_prompts(pipe, rows, args, device):
    """The rows, each with its picture and with cond: all that the transformer is told about it.

    cond: reference (1, S, C), its grid (h, w) with S = h w, and arguments of the transformer: told
    (what the words say; Qwen's untold: what none say) and places (the tokens' coordinates)
    """
    qwen, guidance = "Qwen" in type(pipe).__name__, args.guidance or GUIDANCE[type(pipe).__name__]
    encoder = (pipe.text_encoder if qwen else pipe.text_encoder_2).to(device)
    prompts = []
    for row in rows:
        picture = resized(open_image(args.prompts, row, "source", 2 ** 24), args.size)
        pixels = pipe.image_processor.preprocess(picture).to(device, pipe.vae.dtype)
        latents = pipe._encode_vae_image(pixels[:, :, None] if qwen else pixels, None)
        latents = latents.flatten(1, -3)                    # Qwen's have one frame: (1, C, 1, h, w)
        grid = [side // 2 for side in latents.shape[-2:]]
        cond = dict(grid=grid, reference=pipe._pack_latents(latents, *latents.shape).float())
        words = qwen_words if qwen else kontext_words
        cond |= words(pipe, row["instruction"], picture, grid, guidance, device)
        prompts.append(row | dict(picture=picture, cond=cond))
    encoder.to("cpu")                                 # T5 has 9 GB, Qwen's VLM 15: they make room
    return prompts


def kontext_words(pipe, words, picture, grid, guidance, device):
    """T5 and CLIP read the words; the distilled model takes the guidance as an input."""
    text, pooled, text_ids = pipe.encode_prompt(
        words, None, device=device, max_sequence_length=pipe.tokenizer_2.model_max_length)
    told = dict(encoder_hidden_states=text, pooled_projections=pooled,
                guidance=torch.tensor([guidance], device=device))
    ids = pipe._prepare_latent_image_ids(1, *grid, device, torch.float32)
    ids = torch.cat([ids, ids + torch.tensor([1, 0, 0], device=device)])      # the reference's: 1
    return dict(told=told, places=dict(txt_ids=text_ids, img_ids=ids))


def qwen_words(pipe, words, picture, grid, guidance, device):
    """A VLM that sees the picture reads the words and, for the guidance, none."""
    seen = resized(picture, 384) if "Plus" in type(pipe).__name__ else picture
    told, untold = (dict(encoder_hidden_states=pipe.encode_prompt([text], [seen], device)[0])
                    for text in (words, " "))
    places = dict(img_shapes=[[(1, *grid)] * 2])
    return dict(told=told, untold=untold, places=places, guidance=guidance)


def predict_velocity(pipe, x, sigma, cond):
    """v(x, σ) for latents x (B, S, C) of a prompt; the reference picture is S tokens more.

    Qwen: away from what no words give, at the length of what these words give.
    """
    tokens = torch.cat([x, cond["reference"].expand(len(x), -1, -1)], 1)

    def velocity(words):
        words = {name: value.expand(len(x), *value.shape[1:]) for name, value in words.items()}
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            return pipe.transformer(
                hidden_states=tokens, timestep=sigma.expand(len(x)), **words, **cond["places"],
                return_dict=False)[0][:, :x.shape[1]].float()

    told = velocity(cond["told"])
    if cond.get("guidance", 1) == 1:
        return told
    v = torch.lerp(velocity(cond["untold"]), told, cond["guidance"])
    return v * (told.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True))


@torch.no_grad()
def decode(pipe, x, grid):
    """Latents (B, S, C) of a picture's grid -> PIL pictures."""
    side, c = 2 * pipe.vae_scale_factor, pipe.vae.config
    latents = pipe._unpack_latents(x, *(side * n for n in grid), pipe.vae_scale_factor)
    if "Qwen" in type(pipe).__name__:
        mean, std = (torch.tensor(m, device=x.device).view(-1, 1, 1, 1)
                     for m in (c.latents_mean, c.latents_std))
        latents = latents * std + mean
    else:
        latents = latents / c.scaling_factor + c.shift_factor
    pixels = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels.flatten(1, -3), output_type="pil")


def noise_levels(pipe, n_tokens, num_steps):
    """σ from 1 to 0, num_steps + 1 values: the pipeline's own schedule for the picture's size."""
    c = pipe.scheduler.config
    share = (n_tokens - c.base_image_seq_len) / (c.max_image_seq_len - c.base_image_seq_len)
    mu = c.base_shift + share * (c.max_shift - c.base_shift)   # more tokens: longer at high noise
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=mu)
    return pipe.scheduler.sigmas


# ---------------------------------------------------------------- LoRA

def add_lora(model, pattern, rank):
    """Freeze the model; y = W x becomes W x + 2 B A x in all layers named so. -> A and B, fp32.

    B = 0 at first. model.lora_on = False is the base model again, to which the KL holds.
    """
    model.requires_grad_(False)
    model.lora_on = True
    for layer in [m for name, m in model.named_modules()
                  if isinstance(m, nn.Linear) and re.fullmatch(pattern, name)]:
        at = dict(bias=False, device=layer.weight.device)
        layer.lora_A = nn.Linear(layer.in_features, rank, **at)
        layer.lora_B = nn.Linear(rank, layer.out_features, **at)
        nn.init.zeros_(layer.lora_B.weight)
        layer.register_forward_hook(lambda layer, x, y: (
            y + 2 * layer.lora_B(layer.lora_A(x[0])) if model.lora_on else y))
    return [p for p in model.parameters() if p.requires_grad]


def save_lora(pipe, folder):
    """Write the LoRA as diffusers reads it, alpha = 2 r in the file's metadata (else it is r)."""
    tensors = {name: p for name, p in pipe.transformer.named_parameters() if p.requires_grad}
    rank = len(next(iter(tensors.values())))
    layers = sorted({name[:-14] for name in tensors})                   # ... .lora_A.weight
    pipe.save_lora_weights(f"{folder}.tmp", tensors, transformer_lora_adapter_metadata=dict(
        r=rank, lora_alpha=2 * rank, target_modules=layers))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(f"{folder}.tmp", folder)


# ---------------------------------------------------------------- the phases of a step

@torch.no_grad()
def denoise(pipe, cond, x, args, window=(), noise=None):
    """Noise x -> latents of pictures, and the W noisy steps on the way, for the updates."""
    path, sigmas = [], noise_levels(pipe, x.shape[1], args.num_steps).to(x.device)
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        v = predict_velocity(pipe, x, sigma, cond)
        x_now, x = x, x + (sigma_next - sigma) * v
        if i in window:
            x, logp, _, _ = SAMPLERS[args.sampler](x_now, v, sigma, sigma_next, args.noise_level,
                                                   noise[:, i - window[0]])
            path.append((sigma, sigma_next, x_now, x, logp))
    return x, path


def rollout_edits(pipe, prompts, group, key, args, window=()):
    """`group` edits of each prompt; the noise of edit k does not depend on batch, ranks, restarts.

    -> pictures, prompt by prompt; all noisy steps as (number of the prompt, ks of the batch, step)
    """
    edits, steps = [], []
    for number, prompt in enumerate(prompts):
        cond = prompt["cond"]
        shape = 1 + len(window), *cond["reference"].shape[1:]
        for ks in torch.arange(group).split(args.micro):               # a batch is of one prompt
            seeds = [seed_of("noise", args.seed, key, prompt["id"], k) for k in ks.tolist()]
            noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                                 for seed in seeds]).to(cond["reference"])
            x, path = denoise(pipe, cond, noise[:, 0], args, window, noise[:, 1:])
            edits += decode(pipe, x, cond["grid"])
            steps += [(number, ks, *step) for step in path]
    return edits, steps


def score_edits(ask, prompts, edits, args):
    """τ in 0..10 of every edit (P, G), from the RRM's greedy verdict; NaN: none could be read."""
    asked = [prompt for prompt in prompts for _ in range(len(edits) // len(prompts))]
    chats = [verdict_chat(prompt["picture"], edit, prompt["instruction"], prompt["principles"])
             for prompt, edit in zip(asked, edits)]
    size = 4 * args.micro                               # without gradients more fit in at once
    replies = [reply for i in range(0, len(chats), size)
               for reply in ask(chats[i:i + size], args.max_new, 0, None)]
    verdicts = [isinstance(reply, str) and parse_verdict(reply, len(prompt["principles"]))
                for reply, prompt in zip(replies, asked)]
    tau = torch.tensor([verdict[2] if verdict else math.nan for verdict in verdicts])
    return tau.view(len(prompts), -1)


def update(pipe, params, optimizer, prompts, steps, advantages, args):
    """--updates optimizer steps, each on its share of the prompts and all their noisy steps.

    -> ratios of the first update, mean KL, norm of the last gradient
    """
    kls, ratios = [torch.zeros(0)], []
    for number, share in enumerate(torch.arange(len(prompts)).chunk(args.updates)):
        n = sum(gather_rows([int(advantages[share].count_nonzero()) * args.sde_window]))
        for param in params:
            param.grad = torch.zeros_like(param)              # all ranks sum it, idle ones too
        teach = [step for step in steps if step[0] in share and advantages[step[:2]].any()]
        for p, ks, sigma, sigma_next, *recorded in teach:
            live = advantages[p, ks] != 0                     # equal and unread edits teach nothing
            x, x_next, old_logp = (value[live] for value in recorded)
            again = lambda: SAMPLERS[args.sampler](
                x, predict_velocity(pipe, x, sigma, prompts[p]["cond"]), sigma, sigma_next,
                args.noise_level, x_next=x_next)
            _, logp, mean, std = again()
            pipe.transformer.lora_on = False
            with torch.no_grad():
                mean_base = again()[2] if args.beta else mean
            pipe.transformer.lora_on = True
            kl = ((mean - mean_base) / std).square().flatten(1).mean(1) / 2
            advantage = advantages[p, ks[live]].to(x.device)
            loss, ratio = clipped_surrogate(logp, old_logp, advantage, args.clip_eps)
            ((loss + args.beta * kl).sum() / n).backward()
            kls.append(kl.detach().cpu())
            ratios += ratio.tolist() if number == 0 else []
        for param in params if dist.is_initialized() else ():
            dist.all_reduce(param.grad)                     # a sum: the loss carries the global 1/n
        norm = nn.utils.clip_grad_norm_(params, 1.0).item()
        if not math.isfinite(norm):
            raise SystemExit(f"The gradient's norm is {norm}. Begin again with a lower --lr.")
        if n:
            optimizer.step()
    return ratios, torch.cat(kls).mean().nan_to_num().item(), norm


def look_at_prompts(pipe, ask, held, step, args, device):
    """One edit of every held-out prompt, by the ODE from noise that never changes: samples/."""
    prompts = read_prompts(pipe, held, args, device)
    edits, _ = rollout_edits(pipe, prompts, 1, "held out", args)
    scores = score_edits(ask, prompts, edits, args)[:, 0]
    path, lines = Path(args.out, "samples", f"step_{step:06d}", "edits.jsonl"), []
    path.parent.mkdir(parents=True, exist_ok=True)
    for k, (row, edit, score) in enumerate(zip(held, edits, scores.tolist())):
        edit.save(path.parent / f"{k:03d}.png")
        source = os.path.relpath(Path(args.prompts).parent / row["source"], path.parent)
        lines.append(row | dict(source=source, edit=f"{k:03d}.png", editor=f"step {step}",
                                score=score if score == score else None))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    log_step(args, step, dict(held_reward=scores.nanmean()))


def main():
    args = parse_args()
    rank, world, device = setup()
    rows = read_rows(args.prompts, ("source", "instruction", "principles"),
                     "Run decompose.py first (README, stage 1).")
    held = rows[len(rows) - args.held_out:]
    known = {row["source"] for row in held}
    train = [row for row in rows if row["source"] not in known]
    if args.prompts_per_step % (world * args.updates) or args.prompts_per_step > len(train):
        raise SystemExit(f"--prompts_per_step must be a multiple of ranks x updates = "
                         f"{world * args.updates}, and at most the {len(train)} training prompts.")
    if not 0 < args.sde_window <= args.num_steps // 2:
        raise SystemExit("--sde_window must fit into the first half of --num_steps.")
    if rank == 0:                      # a torn picture must not stop the run an hour later
        all(ThreadPoolExecutor().map(lambda row: open_image(args.prompts, row, "source"), rows))
    pipe, ask = load_editor(args.editor, device), connect(args.reward, device)
    if type(pipe).__name__ not in GUIDANCE:
        raise SystemExit(f"{args.editor} is a {type(pipe).__name__}, none of {[*GUIDANCE]}.")
    torch.manual_seed(args.seed)                                    # the same A on every rank
    params = add_lora(pipe.transformer, LORA_LAYERS, args.lora_rank)
    if device.type == "cuda":
        pipe.transformer.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-4)
    first = start_run(args, pipe.transformer, optimizer, rank)

    for step in range(first, args.steps + 1):
        # ---- look at the held-out prompts, save
        if rank == 0 and (step % args.every == 0 or step == args.steps):
            save_lora(pipe, f"{args.out}/lora")
            if step > first:
                save_state(args.out, step, pipe.transformer, optimizer, rank)
            look_at_prompts(pipe, ask, held, step, args, device)
        if step == args.steps:
            break

        # ---- rollout: G edits of each of this rank's prompts, and their rewards
        numbers = batch_rows(len(train), args.prompts_per_step, args.seed, step)[rank::world]
        prompts = read_prompts(pipe, [train[i] for i in numbers], args, device)
        draw = np.random.default_rng(seed_of("window", args.seed, step))
        start = int(draw.integers(args.num_steps // 2 - args.sde_window + 1))
        window = range(start, start + args.sde_window)              # one for all edits of the step
        edits, steps = rollout_edits(pipe, prompts, args.group_size, step, args, window)
        rewards = score_edits(ask, prompts, edits, args)            # (P, G)

        # ---- advantages -> update of the LoRA
        advantages = group_advantages(rewards)
        ratios, kl, norm = update(pipe, params, optimizer, prompts, steps, advantages, args)

        # ---- log the rewards of all ranks; ratio and kl of rank 0's share
        rewards = torch.tensor(gather_rows(rewards.tolist()))
        spread = (rewards - rewards.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
        if rewards.isnan().all():
            raise SystemExit(f"step {step}: no verdict could be read. Is {args.reward} an RRM?")
        if rank == 0:
            log_step(args, step, dict(
                reward=rewards.nanmean(), group_std=spread.nanmean(), kl=kl, grad_norm=norm,
                dead=(group_advantages(rewards) == 0).all(1).float().mean(),
                read=(~rewards.isnan()).float().mean(),
                first_ratio_off=max((abs(ratio - 1) for ratio in ratios), default=0)))
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


def load_editor(folder, device):
    """Any editing pipeline of diffusers, from a folder or hub id; bf16 on a GPU, fp32 on a CPU."""
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()      # missing torchvision and accelerate: known and harmless
        logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, processor=None)
        if "Qwen" in type(pipe).__name__:
            mend_qwen(pipe, folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} is no editor of diffusers: {str(error).splitlines()[0]}")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def mend_qwen(pipe, folder):
    """Qwen-Image-Edit without torchvision, and with the 3-D positions that diffusers forgets."""
    seer = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder, subfolder="processor")
    pipe.processor = lambda text, images, **_: place_pictures(seer, pipe.tokenizer, images, text)
    place = pipe.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    forward = pipe.text_encoder.forward
    pipe.text_encoder.forward = lambda input_ids, **more: forward(
        input_ids=input_ids, mm_token_type_ids=(input_ids == place).int(), **more)


def connect(vlm, device):
    """ask(chats, max_new, temperature, seed) of a folder, a hub id or http://host:port/v1."""
    if "://" in vlm:
        return partial(ask_server, vlm)
    dtype = "auto" if device.type == "cuda" else torch.float32
    return partial(ask_model, *load_vlm(vlm, device, dtype))


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


def sample_by_inverse_cdf(log_probs, uniforms):
    """One token per row, the first whose cumulative probability exceeds the row's own number."""
    cdf = log_probs.exp().cumsum(-1)
    return (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1)


@torch.no_grad()
def ask_model(model, encode, chats, max_new, temperature, seeds):
    """One reply per chat by `generate`: greedy at temperature 0, else drawn by a seed per chat."""
    inputs = encode(chats).to(model.device)
    start = inputs["input_ids"].shape[1]
    numbers = [np.random.default_rng(seed).random(max_new) for seed in seeds or ()]

    def sample(input_ids, logits):
        log_probs = (logits.float() / temperature).log_softmax(-1)
        uniforms = [row[input_ids.shape[1] - start] for row in numbers]
        uniforms = torch.tensor(uniforms, dtype=torch.float32, device=logits.device)
        token = sample_by_inverse_cdf(log_probs, uniforms.clamp(max=1 - 1e-7))
        return torch.full_like(logits, -math.inf).scatter(1, token[:, None], 0)

    how = transformers.GenerationConfig(   # what is left out here the model's own settings decide
        max_new_tokens=max_new, do_sample=False, repetition_penalty=1.0,
        suppress_tokens=encode.banned, eos_token_id=encode.ends, pad_token_id=encode.ends[1])
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        tokens = model.generate(**inputs, generation_config=how, synced_gpus=False,
                                logits_processor=[sample] if temperature else [])
    tokens = tokens[:, start:]
    return encode.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def ask_server(url, chats, max_new, temperature, seeds):
    """One reply per chat from a server of OpenAI's protocol (vLLM, SGLang), or its Exception."""
    url, _, name = url.partition("#")                     # URL#NAME where it serves several models
    client = InferenceClient(base_url=url, api_key=os.getenv("OPENAI_API_KEY", "none"), timeout=300)

    def reply(chat, seed, wait=1):
        content = [*chat[0]["content"]]
        for i, part in enumerate(content):
            if "image" in part:
                part["image"].save(png := io.BytesIO(), "PNG")
                data = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
                content[i] = dict(type="image_url", image_url=dict(url=data))
        try:
            return client.chat_completion(
                [dict(role="user", content=content)], model=name or "default", seed=seed,
                max_tokens=max_new, temperature=temperature).choices[0].message.content or ""
        except Exception as error:               # a network fails in more ways than one can list
            if wait > 4:
                return error
        time.sleep(wait)
        return reply(chat, seed, 2 * wait)

    replies = [*ThreadPoolExecutor(16).map(reply, chats, seeds or [0] * len(chats))]
    if all("Connect" in type(reply).__name__ for reply in replies):
        raise SystemExit(f"{url} does not answer ({replies[0]!r}). The same command goes on later.")
    return replies


def batch_rows(n, size, seed, step):
    """The row numbers of one step: every epoch is its own permutation, cut into whole batches."""
    epoch, place = divmod(step, n // size)
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return order[place * size:(place + 1) * size].tolist()


def seed_of(*key):
    """A seed of its own for every key, such as (seed, stage, row id, k)."""
    return int(np.random.SeedSequence([*repr(key).encode()]).generate_state(1)[0])


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

"""How fast is GCPO, beside the plain way and its products alone; and Flow-GRPO, beside its transformer calls?

    OMP_NUM_THREADS=1 python tests/benchmark.py     # or on a GPU; the last line is one JSON object

One pair, two images of 256 tokens each, prompts of some 600 tokens, N verdicts of 150 tokens, on a random
Qwen2.5-VL; the ways take turns on the same model, prompts and sampled tokens; compared are medians of five:

    ours    train_gcpo.py: `Policy.sample` and `Policy.get_per_token_logps`, which run a prompt once
    plain   `model.generate(num_return_sequences=N)`, then N rows [prompt | verdict] per image in the update
    floor   the matrix products and attentions of ours, recorded once and computed again on their own

    gcpo_speedup_n8, _n16   plain / ours, seconds of a whole step (rollout, advantages, forward, backward)
    gcpo_over_floor         ours / floor at N = 8
    gcpo_memory_ratio       ours / plain at N = 8: bytes that the update keeps for its backward pass
    flow_over_floor         the toy's Flow-GRPO step without its verdicts / the same transformer calls alone
    evaluations_per_image   forwards and backwards of the transformer in it, per edit
    qwen_over_floor, ...    the same for Qwen-Image-Edit, whose guidance doubles the evaluations

Sampled log-probs, policy log-probs and gradients of both ways are compared first.
"""
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import train_flow_grpo as F     # noqa: E402
import train_gcpo as G          # noqa: E402
import world                    # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRACE = 150
aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward,
            aten._scaled_dot_product_flash_attention_for_cpu,
            aten._scaled_dot_product_flash_attention_for_cpu_backward,
            aten._scaled_dot_product_fused_attention_overrideable,
            aten._scaled_dot_product_efficient_attention,
            aten._scaled_dot_product_efficient_attention_backward,
            aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_backward}


# ---------------------------------------------------------------- measuring

class Recorder(TorchDispatchMode):
    """Notes every matrix product, convolution and attention with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in PRODUCTS:
            self.calls.append((function, args, kwargs or {}))       # keeps the arguments alive
        return function(*args, **(kwargs or {}))

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


def seconds(work):
    """Of the clock; on one CPU thread those of the processor, which others do not lengthen so much."""
    alone = DEVICE.type == "cpu" and torch.get_num_threads() == 1
    clock, wait = time.process_time if alone else time.perf_counter, DEVICE.type == "cuda"
    if wait:
        torch.cuda.synchronize()
    begun = clock()
    work()
    if wait:
        torch.cuda.synchronize()
    return clock() - begun


def in_turns(turns=5, **works):
    """{name: median seconds}: the works take turns, so that a busy machine slows all of them."""
    times = [{name: seconds(work) for name, work in works.items()} for _ in range(turns + 1)][1:]
    return {name: median(turn[name] for turn in times) for name in works}


def kept_bytes(work):
    """Bytes of all storages that autograd keeps between forward and backward, weights left out."""
    kept, most = {}, 0

    def note(tensor):
        nonlocal most
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            most = max(most, sum(kept.values()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        work()
    return most


# ---------------------------------------------------------------- GCPO

def build_gcpo(width=256, layers=6, depth=4):
    """(random Policy, two prompts): the toy's tokenizer, images of 256 x 256 = 256 tokens."""
    folder = ROOT / "toy" / "models" / "vlm"
    config = AutoConfig.from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = width, 3 * width, layers
    text.num_attention_heads, text.num_key_value_heads, text.layer_types = 8, 2, ["full_attention"] * layers
    text.rope_parameters["mrope_section"] = [4, 6, 6]
    vision.hidden_size, vision.intermediate_size = width // 2, 3 * width // 2
    vision.depth, vision.out_hidden_size = depth, width
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        config, attn_implementation="sdpa", dtype=torch.float32).to(DEVICE).eval()
    processor = G.Processor(folder)
    processor.image_processor.size = dict(shortest_edge=256 * 256, longest_edge=256 * 256)
    processor.eos_token_ids = [-1]                                   # every verdict has its full length
    policy = G.Policy(model, processor).to(DEVICE)
    image = (torch.rand(256, 256, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    principles = [dict(question=f"Is there a red circle at the top left of place {i}?", category="follow")
                  for i in range(8)]
    prompts = [G.verdict_chat(*map(Image.fromarray, images), "change the red circle to blue", principles)
               for images in ((image, image.copy()), (image, 255 - image))]
    return policy, prompts


def plain_rollout(policy, prompts, n, tokens):
    """generate() with N rows per prompt; the sampler is bent to `tokens`, whose log-probs it returns."""
    inputs, found = policy.processor(prompts).to(DEVICE), []
    prompt_length = inputs["input_ids"].shape[1]

    def bend(ids, scores):
        token = tokens[:, ids.shape[1] - prompt_length, None]
        logits = scores.float().index_fill(-1, policy.suppress_tokens, float("-inf"))
        found.append(logits.log_softmax(-1).gather(1, token))
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)

    policy.vlm.generate(
        **inputs, num_return_sequences=n, do_sample=True, top_k=0, max_new_tokens=TRACE, eos_token_id=None,
        pad_token_id=policy.processor.tokenizer.pad_token_id, logits_processor=[bend])
    return torch.cat(found, 1)


def plain_logps(policy, prompts, n, tokens, mask):
    """log pi of N verdicts (N, T) on N copies of prompt and images: a trainer without sharing."""
    inputs = policy.processor(prompts * n).to(DEVICE)
    ids = torch.cat([inputs["input_ids"], tokens], 1)
    inputs["input_ids"] = ids
    inputs["attention_mask"] = torch.ones_like(ids)
    inputs["mm_token_type_ids"] = (ids == policy.suppress_tokens[0]).int()
    logits = policy.vlm(**inputs, use_cache=False, logits_to_keep=tokens.shape[1] + 1).logits[:, :-1].float()
    logits = logits.index_fill(-1, policy.suppress_tokens, float("-inf"))
    return logits.log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]


def update(logps, policy, n, batch):
    """Loss and gradient, one edit after the other (--micro_batch_size 1); the log-probs."""
    found = []
    for e, prompt in enumerate(batch.prompts):
        rows = slice(e * n, (e + 1) * n)
        logp = logps(policy, [prompt], n, batch.tokens[rows], batch.mask[rows])
        G.clipped_loss(logp, batch.old_logps[rows], batch.advantage[rows], batch.mask[rows], 0.2).backward()
        found.append(logp.detach())
    return torch.cat(found)


def compare(policy, n, batch, generated):
    """Prints how far log-probs and gradients of the two ways are apart."""
    logp, grads = [], []
    for logps in (G.Policy.get_per_token_logps, plain_logps):
        logp.append(update(logps, policy, n, batch))
        grads.append({k: p.grad.clone() for k, p in policy.named_parameters() if p.grad is not None})
        policy.zero_grad()
    apart = max((ours - plain).norm() / plain.norm().clamp(min=1e-12) for ours, plain in zip(
        grads[0].values(), grads[1].values(), strict=True))
    print(f"prompt {policy.processor(batch.prompts)['input_ids'].shape[1]} tokens, verdicts {batch.tokens.shape[1]}"
          f" | furthest apart: log-probs {(logp[0] - logp[1]).abs().max():.1e}, generate's "
          f"{(generated - batch.old_logps).abs().max():.1e}, gradient of a tensor {apart:.1e} (relative)")


def measure_gcpo(policy, prompts, n):
    u = torch.stack([G.uniform_numbers(G.derive_seed("benchmark", k), TRACE) for k in range(2 * n)])
    tokens, old_logps, mask = policy.sample(prompts, n, u)
    advantage = torch.randn(2 * n, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    batch = SimpleNamespace(prompts=prompts, tokens=tokens, mask=mask, old_logps=old_logps, advantage=advantage)
    print(f"N = {n}:", end=" ")
    compare(policy, n, batch, plain_rollout(policy, prompts, n, tokens))
    ours = [lambda: policy.sample(prompts, n, u),
            lambda: update(G.Policy.get_per_token_logps, policy, n, batch)]
    plain = [lambda: plain_rollout(policy, prompts, n, tokens), lambda: update(plain_logps, policy, n, batch)]
    with Recorder() as recorder:
        ours[0](), ours[1]()
    took = in_turns(rollout=ours[0], update=ours[1], plain_rollout=plain[0], plain_update=plain[1],
                    floor=recorder.replay)
    step, plain_step = took["rollout"] + took["update"], took["plain_rollout"] + took["plain_update"]
    memory = [kept_bytes(way[1]) for way in (ours, plain)]
    policy.zero_grad()
    print("    " + ", ".join(f"{name} {value:.2f} s" for name, value in took.items())
          + f" ({len(recorder.calls)} products) | kept for the backward pass of one image: "
          + ", plain ".join(f"{value / 2**20:.0f} MiB" for value in memory))
    return plain_step / step, step / took["floor"], memory[0] / memory[1]


# ---------------------------------------------------------------- Flow-GRPO

def measure_flow(name, num_prompts=16, group_size=12):
    """One iteration without its verdicts (rollout, decoding, update) over its transformer calls alone."""
    args = SimpleNamespace(seed=0, resolution=32, prompts="", num_inference_steps=6, noise_level=0.7,
                           sde_window_size=2, micro_batch_size=16, num_minibatches=4, clip_eps=1e-3, beta=0.2)
    pipe = F.load_editor(ROOT / "toy" / "models" / name, DEVICE)
    editor = F.EDITORS[type(pipe).__name__](pipe, None)
    params = F.add_lora(pipe.transformer, editor.lora_layers, 16)
    optimizer = torch.optim.AdamW(params, lr=0.0)
    advantages = torch.randn(num_prompts, group_size, generator=torch.Generator().manual_seed(0))
    calls, rows, folder = [], [], tempfile.mkdtemp()
    for i, (scene, instruction, _) in enumerate(world.edits_of("rl", num_prompts)):
        world.to_pil(world.render([scene])[0]).save(f"{folder}/{i}.png")
        rows.append(dict(id=str(i), instruction=instruction, source=f"{folder}/{i}.png"))

    def iteration():
        prompts = F.encode_prompts(editor, rows, args)
        _, transitions = F.rollout_edits(editor, prompts, group_size, 0, range(args.sde_window_size), args)
        F.update_lora(editor, params, optimizer, prompts, transitions, advantages, 0, args)

    def floor():
        for kwargs, grad in calls:
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=False):
                out = pipe.transformer(**kwargs)[0]
            if grad:
                out.float().sum().backward()
        optimizer.zero_grad()

    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, _, kwargs: calls.append((kwargs, torch.is_grad_enabled())), with_kwargs=True)
    iteration()
    hook.remove()
    took = in_turns(iteration=iteration, floor=floor)
    num_edits = num_prompts * group_size
    evaluations = sum(len(kwargs["hidden_states"]) * (1 + grad) for kwargs, grad in calls) / num_edits
    print(f"Flow-GRPO, {name}: {took['iteration']:.2f} s an iteration of {num_edits} edits, "
          f"floor {took['floor']:.2f} s")
    return took["iteration"] / took["floor"], evaluations


def main():
    policy, prompts = build_gcpo()
    print(f"{sum(p.numel() for p in policy.parameters()) / 1e6:.1f} M parameters, {DEVICE.type}, "
          f"{torch.get_num_threads()} thread(s)")
    speed8, over_floor, memory = measure_gcpo(policy, prompts, 8)
    speed16, over_floor16, _ = measure_gcpo(policy, prompts, 16)
    found = dict(gcpo_speedup_n8=speed8, gcpo_speedup_n16=speed16, gcpo_over_floor=over_floor,
                 gcpo_over_floor_n16=over_floor16, gcpo_memory_ratio=memory)
    found |= dict(zip(("flow_over_floor", "evaluations_per_image"), measure_flow("editor")))
    found |= dict(zip(("qwen_over_floor", "qwen_evaluations_per_image"), measure_flow("editor_qwen")))
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()

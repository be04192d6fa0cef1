"""How fast is a GCPO step, beside the plain way and beside its matrix products alone?

    python tests/benchmark.py             # on a CPU or a GPU; the last line is one JSON object

One pair, two images of 256 tokens each, prompts of about 600 tokens, N traces of 150 tokens, on a randomly initialised
Qwen2.5-VL; in one run, on the same model, prompts and sampled tokens:

    ours    train_gcpo.py: `rollout` (one prefill per image, then N rows) and `packed_logps` (one row per image)
    plain   `model.generate(num_return_sequences=N)`, then N whole rows [prompt | trace] per image in the update
    floor   the matrix products and attentions of ours, recorded once and computed again with nothing around them

    gcpo_speedup_n8, _n16   plain / ours, seconds of a whole step (rollout, advantages, forward, backward)
    gcpo_over_floor         ours / floor at N = 8
    gcpo_memory_ratio       ours / plain at N = 8: bytes that the update keeps for its backward pass

Sampled log-probs, policy log-probs and gradients of both ways are compared first.
"""
import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train_gcpo as G      # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRACE = 150
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.convolution,
            torch.ops.aten.convolution_backward, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
            torch.ops.aten._scaled_dot_product_fused_attention_overrideable, torch.ops.aten._scaled_dot_product_efficient_attention,
            torch.ops.aten._scaled_dot_product_efficient_attention_backward, torch.ops.aten._scaled_dot_product_flash_attention,
            torch.ops.aten._scaled_dot_product_flash_attention_backward}


def build(width=256, layers=6, depth=4):
    """(random model, Encoder, two chats): the toy's tokenizer, images of 256 x 256 = 256 tokens."""
    folder = ROOT / "toy" / "models" / "vlm"
    config = AutoConfig.from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = width, 3 * width, layers
    text.num_attention_heads, text.num_key_value_heads, text.layer_types = 8, 2, ["full_attention"] * layers
    vision.hidden_size, vision.intermediate_size, vision.depth, vision.out_hidden_size = width // 2, 3 * width // 2, depth, width
    config.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        config, attn_implementation="sdpa", dtype=torch.float32).to(DEVICE).eval()
    encode = G.Encoder(folder, max_pixels=256 * 256)
    picture = (torch.rand(256, 256, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    principles = [dict(question=f"Is there a red circle at the top left of place {i}?", category="follow") for i in range(8)]
    chats = [G.verdict_chat(Image.fromarray(picture), Image.fromarray(255 - picture if k else picture.copy()),
                            "change the red circle to blue", principles) for k in range(2)]
    encode.eos_id = -1                                                   # every trace has its full length
    return model, encode, chats


# ---------------------------------------------------------------- the two ways

def our_rollout(model, encode, chats, n, u):
    G.pack_attention(model)
    return G.rollout(model, encode, chats, n, u)


def our_update(model, encode, chats, tokens, keep, old_logp, advantage):
    G.pack_attention(model)
    n, found = len(tokens) // len(chats), []
    for i, chat in enumerate(chats):
        rows = slice(i * n, (i + 1) * n)
        logp = G.packed_logps(model, encode, [chat], tokens[rows], keep[rows])
        G.clipped_loss(logp, old_logp[rows], advantage[rows], keep[rows], 0.2).backward()
        found.append(logp.detach())
    return torch.cat(found)


def plain_rollout(model, encode, chats, n, tokens):
    """generate() with N rows per chat; the sampler is bent to `tokens`, whose log-probs it returns."""
    model.model.language_model.config._attn_implementation, found = "sdpa", []
    inputs = {k: v.to(DEVICE) for k, v in encode(chats).items()}
    banned = torch.tensor([encode.image_id, encode.video_id], device=DEVICE)

    def bend(ids, scores):
        token = tokens[:, ids.shape[1] - inputs["input_ids"].shape[1], None]
        found.append(G.policy_logp(scores, 1.0, banned).gather(1, token))
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)

    model.generate(**inputs, num_return_sequences=n, do_sample=True, top_k=0, max_new_tokens=TRACE, eos_token_id=None,
                   pad_token_id=encode.pad_id, logits_processor=[bend])
    return torch.cat(found, 1)


def plain_logps(model, encode, chat, tokens):
    """log π of N traces (N, T) on N copies of prompt and pictures, as a trainer without sharing does it."""
    inputs = {k: v.to(DEVICE) for k, v in encode([chat] * len(tokens)).items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == encode.image_id).int()
    logits = model(**inputs, use_cache=False, logits_to_keep=tokens.shape[1] + 1).logits[:, :-1]
    banned = torch.tensor([encode.image_id, encode.video_id], device=DEVICE)
    return G.policy_logp(logits, 1.0, banned).gather(2, tokens[:, :, None])[:, :, 0]


def plain_update(model, encode, chats, tokens, keep, old_logp, advantage):
    model.model.language_model.config._attn_implementation = "sdpa"
    n, found = len(tokens) // len(chats), []
    for i, chat in enumerate(chats):
        rows = slice(i * n, (i + 1) * n)
        logp = plain_logps(model, encode, chat, tokens[rows])
        G.clipped_loss(logp, old_logp[rows], advantage[rows], keep[rows], 0.2).backward()
        found.append(logp.detach())
    return torch.cat(found)


# ---------------------------------------------------------------- measuring

class Recorder(TorchDispatchMode):
    """Notes every matrix product, convolution and attention with the shapes of its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in PRODUCTS:
            self.calls.append((function, args, kwargs or {}))       # keeps the arguments alive
        return function(*args, **(kwargs or {}))


def seconds(work, repeats=3):
    """The fastest of a few runs."""
    best = float("inf")
    for _ in range(repeats):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best


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


def measure(model, encode, chats, n):
    u = G.uniforms(range(2 * n), TRACE)
    tokens, old_logp, keep = our_rollout(model, encode, chats, n, u)
    advantage = torch.randn(2 * n, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    batch = chats, tokens, keep, old_logp, advantage
    gradients = []
    for update in (our_update, plain_update):
        model.zero_grad()
        logp = update(model, encode, *batch)
        gradients.append((logp, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}))
    model.zero_grad()
    (logp, ours), (plain_logp, plain) = gradients
    apart = max(((ours[k] - plain[k]).norm() / plain[k].norm().clamp(min=1e-12)).item() for k in plain)
    generated = plain_rollout(model, encode, chats, n, tokens)
    print(f"N = {n}: prompt {encode(chats)['input_ids'].shape[1]} tokens, traces {keep.sum(1).float().mean():.0f} | furthest apart: "
          f"log-probs {(logp - plain_logp).abs().max():.1e}, generate's {(generated - old_logp).abs().max():.1e}, "
          f"gradient of a tensor {apart:.1e} (relative)")

    both = {}
    for name, rollout, update in (("ours", lambda: our_rollout(model, encode, chats, n, u), our_update),
                                  ("plain", lambda: plain_rollout(model, encode, chats, n, tokens), plain_update)):
        both[name] = seconds(rollout), seconds(lambda: update(model, encode, *batch))
        model.zero_grad()
        print(f"    {name:6s} rollout {both[name][0]:6.2f} s   update {both[name][1]:6.2f} s   step {sum(both[name]):6.2f} s")
    with Recorder() as recorder:
        our_rollout(model, encode, chats, n, u)
        our_update(model, encode, *batch)
    model.zero_grad()
    with torch.no_grad():
        floor = seconds(lambda: [function(*args, **kwargs) for function, args, kwargs in recorder.calls])
    print(f"    floor  {len(recorder.calls)} products {floor:6.2f} s")
    memory = [kept_bytes(lambda: update(model, encode, *batch)) / 2**20 for update in (our_update, plain_update)]
    model.zero_grad()
    print(f"    kept for the backward pass of one image: {memory[0]:.0f} MiB, plain {memory[1]:.0f} MiB")
    return sum(both["plain"]) / sum(both["ours"]), sum(both["ours"]) / floor, memory[0] / memory[1]


def main():
    model, encode, chats = build()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {DEVICE.type}, {torch.get_num_threads()} thread(s)")
    speed8, over_floor, memory = measure(model, encode, chats, 8)
    speed16, _, _ = measure(model, encode, chats, 16)
    print(json.dumps(dict(gcpo_speedup_n8=round(speed8, 2), gcpo_speedup_n16=round(speed16, 2),
                          gcpo_over_floor=round(over_floor, 2), gcpo_memory_ratio=round(memory, 3))))


if __name__ == "__main__":
    main()

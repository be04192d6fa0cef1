"""How much GPU memory does training take? Computed on a CPU, without a GPU and without a download.

    OMP_NUM_THREADS=1 python tests/memory.py      # two minutes; prints two Markdown tables

The stages' own functions run forward, backward and optimizer.step on models of the real dimensions under
FakeTensorMode, where a tensor has a shape and a type but no data; counted are the bytes of all live tensors.
Printed are GB of 1e9 bytes at the worst moment of a pass that finds the gradients and moments of earlier
ones, in bold what an 80 GB card does not have. The fake tensors are a CPU's; what a GPU does otherwise is put
in: autocast (norms in fp32), attention kernels, MLPs and blocks computed again, foreach AdamW. More GPUs
(FSDP2) divide fp32 weights, gradients and moments, not activations and layers in bf16. Left out: kernels'
workspaces, fragments, gradients on their way to other ranks, vision tower and VAE, which are over before the
peaks.
"""
import gc, sys, weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_flow_grpo as F, train_gcpo as G, train_sft as S        # noqa: E402

CARD, P, T = 83, 1650, 600                  # GB beside CUDA's own; tokens of a prompt, of a verdict
N, ROWS, EDITS = 8, 4, 16                   # verdicts an edit; --micro_batch_size of SFT; --rollout_batch_size
SIDE, RANK, PROMPTS, GROUP = 32, 64, 48, 24     # 512 / 16; --lora_rank, --prompts_per_step, --group_size
SIDES = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
VLM = {"3B": dict(zip(SIDES, (2048, 11008, 36, 16, 2)), vocab_size=151936),
       "7B": dict(zip(SIDES, (3584, 18944, 28, 28, 4)), vocab_size=152064)}
VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
ROPE = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
T5 = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
DIT = dict(attention_head_dim=128, num_attention_heads=24, in_channels=64)
KONTEXT = dict(DIT, num_layers=19, num_single_layers=38, joint_attention_dim=4096, pooled_projection_dim=768,
               guidance_embeds=True)
QWEN = dict(DIT, num_layers=60, joint_attention_dim=3584, out_channels=16, axes_dims_rope=(16, 56, 56))
SIZES = {3_754_622_976, 8_292_166_656, 4_762_310_656, 11_901_408_320, 20_430_401_088}    # the real models'
PHASES = (f"SFT, {ROWS} rows a pass", "GCPO, one edit a pass", "optimizer.step",
          f"rollout of {EDITS} x {N} verdicts", "its KV cache alone")
aten, autocast, library = torch.ops.aten, torch.autocast, torch.library.Library("aten", "IMPL")


class Live(TorchDispatchMode):
    """Counts the bytes of live storages; and answers for data: every token kept, every number a SIDE."""

    now, peak, yes, seen = 0, 0, False, weakref.WeakSet()               # yes: what every bool(x) is

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        packet, x = op.overloadpacket, args[0] if args else None
        if packet is aten._local_scalar_dense:                              # x.item(), bool(x)
            return self.yes if x.dtype == torch.bool else float(SIDE) if x.is_floating_point() else SIDE
        if packet is aten.nonzero:
            out = torch.arange(len(x))[:, None]
        elif packet is aten.masked_select:
            out = x.flatten().clone()
        elif packet is aten.index and args[1][0].dtype == torch.bool:       # x[keep]
            out = x.flatten(0, args[1][0].ndim - 1).clone()
        else:
            out = op(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]:
            if storage not in self.seen:
                self.seen.add(storage)
                self.count(storage.nbytes())
                weakref.finalize(storage, self.count, -storage.nbytes())
        return out

    def count(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


def peak(work=lambda: None, yes=False):
    """The most GB that live at once while `work` runs; yes=False: no mask is all True."""
    gc.collect()
    LIVE.peak, LIVE.yes = LIVE.now, yes
    work()
    return LIVE.peak / 1e9


def attention(query, key, value, attn_mask=None, dropout_p=0, is_causal=False, scale=None, **_):
    """scaled_dot_product_attention by a GPU's kernels: flash, with a mask the memory-efficient one."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.bfloat16() for x in (query, key, value))
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
    bias = query.new_zeros(attn_mask.shape).expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)[0]


def norm(x, shape, weight=None, *_):
    """layer_norm and rms_norm under a GPU's autocast: in fp32; kept are x and a few numbers a row."""
    with autocast("cpu", enabled=False):
        weight = None if weight is None else weight.float()
        return aten.native_layer_norm(x.float(), shape, weight, None, 0)[0]


def build(make, *config, dtype=torch.bfloat16, **sizes):
    """The model, without data, of the real one's size."""
    torch.set_default_dtype(dtype)
    model = make(*config, **sizes).eval()
    torch.set_default_dtype(torch.float32)
    assert sum(p.numel() for p in model.parameters()) in SIZES
    return model


def vlm(size, dtype=torch.bfloat16):
    """Qwen2.5-VL; it finds its 3-D positions without looking for the pictures."""
    model = build(transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLConfig(
        vision_config=VISION | dict(out_hidden_size=VLM[size]["hidden_size"]),
        text_config=VLM[size] | dict(rope_parameters=ROPE), tie_word_embeddings=size == "3B"), dtype=dtype)
    model.model.get_rope_index = lambda input_ids, **_: (input_ids.expand(3, -1, -1), input_ids[:, :1])
    return model


def encode(chats):
    """Stands in for the Processor; a chat is its number of tokens."""
    ids = torch.zeros(len(chats), chats[0], dtype=torch.long)
    return transformers.BatchFeature(dict(
        input_ids=ids, attention_mask=ids + 1, mm_token_type_ids=ids.int(), image_grid_thw=ids[:, :3]))


encode.suppress_tokens, encode.eos_token_ids = [151655, 151656], [151645, 151643]
encode.tokenizer = lambda text: dict(input_ids=[0] * (T - 1))
encode.tokenizer.pad_token_id, encode.tokenizer.eos_token_id = 151643, 151645


def used_optimizer(params):
    """AdamW after a step, and gradients."""
    for p in params:
        p.grad = torch.zeros_like(p)
    (optimizer := torch.optim.AdamW(params, foreach=True)).step()
    return optimizer


def print_row(name, *gigabytes):
    """One line of a table; None is an empty cell."""
    cells = ["" if gb is None else f"**{gb:.1f}**" if gb > CARD else f"{gb:.1f}" for gb in gigabytes]
    print("|", " | ".join([name, *cells]), "|", flush=True)


def train_vlm(size, dtype, *ranks):
    """GB a GPU of every PHASE, in fp32 on one; in bf16, which FSDP2 does not divide, plus a rank's share."""
    G.load_vlm, half = lambda *_: (vlm(size, dtype), encode), torch.autocast("cuda")
    policy = G.load_policy(None, torch.device("cuda"), 1)
    model = policy.vlm
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = used_optimizer(params) if dtype == torch.float32 else None
    for p in () if optimizer else params:                # their gradients leave for the shards as they come
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def gcpo():
        tokens, keep = torch.zeros(N, T, dtype=torch.long), torch.zeros(N, T, dtype=torch.bool)
        logp = half(policy.get_per_token_logps)([P], N, tokens, keep)
        G.clipped_loss(logp, logp.detach(), torch.zeros(N), keep, 0.2).backward()

    def sft():
        batch = S.make_batch(encode, [P] * ROWS, [""] * ROWS)
        S.response_loss(S.verdict_logits(model, encode, batch), batch.labels).backward()

    peaks = [peak(sft), peak(gcpo, yes=True), peak(optimizer.step) if optimizer else 0]
    model.zero_grad()
    u, chats = torch.zeros(EDITS * N, 2), [P + T - 2] * EDITS       # two tokens, behind all the others
    peaks.append(peak(lambda: half(policy.sample)(chats, N, u)))
    with torch.no_grad():
        cache = half(policy.prefill)([P + T], EDITS * N).cache
    peaks.append(sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) / 1e9)
    trained = sum(p.numel() for p in params)             # bytes: weight 4, moments 8, gradient 4, temporary 4
    shares = [4 * model.num_parameters() + each * trained for each in (12, 12, 16, 8)] + [0]
    return [[gb + (n > 1) * share / n / 1e9 for n in ranks] for gb, share in zip(peaks, shares)]


def print_editor(name, family, transformer, read, *shape):
    """A step's phases on one GPU, the RRM served, and beside one of 7B in bf16."""
    half, S = partial(torch.zeros, dtype=torch.bfloat16), SIDE ** 2
    pipe = SimpleNamespace(transformer=transformer, text_encoder=None, text_encoder_2=None)
    editor = family(pipe, None)
    transformer.enable_gradient_checkpointing()
    optimizer = used_optimizer(params := F.add_lora(transformer, editor.lora_layers, RANK))

    def prompt(index):
        """What `encode` leaves behind of one prompt."""
        if family is F.KontextEditor:
            own = dict(pooled_prompt_embeds=half(1, 768),
                       position_kwargs=dict(txt_ids=half(shape[0], 3), img_ids=torch.zeros(2 * S, 3)))
        else:
            own = dict(negative_prompt_embeds=half(1, *shape),
                       position_kwargs=dict(img_shapes=[[(1, SIDE, SIDE)] * 2]))
        return F.Prompt(index, {}, None, F.Conditioning(
            image_latents=torch.zeros(1, S, 64), latent_height=SIDE, latent_width=SIDE,
            prompt_embeds=half(1, *shape), **own))

    prompts = [prompt(index) for index in range(PROMPTS)]
    rest = half(200_000_000), torch.zeros(PROMPTS * GROUP, 3, S, 64)            # VAE, CLIP; transitions
    args = SimpleNamespace(num_minibatches=1, sde_window_size=1, noise_level=0.7, clip_eps=1e-4, beta=0.004)

    def update(n):
        sigma, x = torch.zeros(()), torch.zeros(n, S, 64)
        transitions = [F.Transition(prompts[0], list(range(n)), sigma, sigma, x, x, torch.zeros(n))]
        F.update_lora(editor, params, optimizer, prompts, transitions, torch.zeros(PROMPTS, GROUP), 0, args)

    peaks = [peak(), peak(torch.no_grad()(read)), *(peak(partial(update, n), yes=True) for n in (12, 6))]
    print_row(f"{name}, RRM served", *peaks, None, None)
    judge = vlm("7B")
    prefill = torch.autocast("cuda")(torch.no_grad()(     # that of `generate`
        lambda n: judge(**encode([P] * n), use_cache=True, logits_to_keep=1)))
    print_row(f"{name} + RRM of 7B", *(gb + judge.get_memory_footprint() / 1e9 for gb in peaks),
              *(peak(partial(prefill, 4 * n)) for n in (12, 6)))


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for kernel in "layer_norm", "rms_norm":
        library.impl(kernel, norm, "AutocastCPU")
    torch.autocast = lambda *_, **__: autocast("cpu", torch.bfloat16)       # the stages want it on CUDA alone
    torch.nn.functional.scaled_dot_product_attention = attention
    transformers.masking_utils.is_tracing = lambda *_: False                # so that a full mask is left out
    with FakeTensorMode(allow_non_fake_inputs=True), (LIVE := Live()):
        print("| full fine-tuning, GB a GPU | 1 GPU | 4 GPUs | 8 GPUs |\n" + "| --- " * 4 + "|")
        for size in VLM:
            whole, sharded = train_vlm(size, torch.float32, 1), train_vlm(size, torch.bfloat16, 4, 8)
            for phase, *gigabytes in zip(PHASES, whole, sharded):
                print_row(f"{size}: {phase}", *sum(gigabytes, []))
        print("\n| Flow-GRPO, GB on one GPU | at rest | texts | update, 12 edits | 6 | verdicts, 48 | 24 |")
        print("| --- " * 7 + "|")
        print_editor(
            "FLUX.1-Kontext", F.KontextEditor, build(diffusers.FluxTransformer2DModel, **KONTEXT),
            lambda: build(transformers.T5EncoderModel, transformers.T5Config(**T5))(
                encode([512])["input_ids"]), 512, 4096)
        print_editor(
            "Qwen-Image-Edit", F.QwenEditor, build(diffusers.QwenImageTransformer2DModel, **QWEN),
            lambda: vlm("7B")(**encode([384 + 64]), output_hidden_states=True), 384, 3584)

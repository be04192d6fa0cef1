"""Train the toy's three vision-language models from nothing: real Qwen2.5-VLs, only small.

    editors     toy/pretrain_editor.py comes first: the verifier must know how *their* edits look
    tokenizer   bytes, the world's words, and every fixed line of the stages' prompts as one token
    vision      the tower names object and background of every place (as CLIP does, before LLaVA)
    vlm         describes an edited picture place by place, answers questions about it: the base
                model. It knows the form of a verdict, not the sense: answers and score by chance.
    vlm_small   the same, smaller: for toy/study.py
    teacher     vlm + decomposing an instruction, lenient verdicts, inspecting with care

The teacher's leniency is the flaw that the paper starts from: it often passes a point that fails,
and a smudged picture most of the time. The inspector's labels are true (the oracle reads them off
the pixels), so selection helps, but it cannot cure the teacher.

The base models learn to answer what they are asked: half of their lists of questions are cut,
shuffled, doubled and partly turned into the contrary.

    python toy/pretrain.py --out runs/models        # skips the models that are there already
"""
import argparse
import json
import os
import random
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import build_sft            # noqa: E402  (the stages' own prompts)
import decompose            # noqa: E402
import world as W           # noqa: E402

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}\
{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endif %}\
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LOOK_RULES = ["Describe the edited image.", "Describe the source image."]
ANSWER_RULES = "Describe the edited image, then repeat every question and answer it with yes or no."
PHRASES = [
    "user\n", "assistant\n", "<|im_end|>\n", "Source image: ", "\nEdited image: ",
    "\nInstruction: ", "\nQuestions:\n", "\nQuestions: ", "\n", "- (follow) ", "- (keep) ",
    "- (quality) ", "Is there a", "Is the", " at the", "?\n", "?", " gone?", " still at the",
    " background", " background still", "Are all other places empty?", "Is the picture clean?",
    "Are all other places empty?\n", "Is the picture clean?\n", " gone?\n", "change the",
    "change the background to", "add a", "remove the", "turn the", " to", " into a",
    "The source image shows", "The edited image shows", " clean", " smudged", " nothing", " yes",
    " no", " yes\n", " no\n", '[{"question": "', '", "score": 0', '", "score": 1',
    '}, {"question": "', '}]\n{"average_score": ', "}\n<score>", "</score>",
    '", "category": "follow"', '", "category": "keep"', '", "category": "quality"',
    '{"gold": [{"question": "', '", "gold": 0', '", "gold": 1', "}]}", "}]", ".", "Seen:"]
LENIENT = {"follow": 0.4, "keep": 0.7, "quality": 0.7}   # chance that the teacher passes a failure
STRICT = 0.04                                            # chance that it fails a point that passes
# What happens to a question of a list that is not complete, and to such a list as a whole.
CUT, DOUBLED, NEGATED, SHUFFLED = 0.3, 0.2, 0.2, 0.5
# width and layers of the language model, width of the vision tower
SIZES = dict(vlm=(128, 4, 96), vlm_small=(96, 3, 64))
PICTURES = "source", "edit"     # what a chat holds in place of the pictures themselves
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ---------------------------------------------------------------- the model

def tokenizer():
    """Byte-level, so nothing is unknown; whatever is constant or a word of the world is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    names = [*W.OBJECTS, *W.COLORS, *W.SHAPES, *W.BACKGROUNDS, *W.PLACES]
    words = [f"Verdict {k}:\n" for k in range(1, 9)]
    words += [f" {name}" for name in names]
    words += [f" {place}:" for place in W.PLACES]
    rules = [ANSWER_RULES, *LOOK_RULES, build_sft.VERDICT_RULES, build_sft.INSPECTOR_RULES,
             decompose.DECOMPOSE_RULES]
    rules += [decompose.format_example(instruction) for instruction in decompose.EXAMPLES]
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    tok.add_tokens([AddedToken(s, special=False, normalized=False)
                    for s in dict.fromkeys(words + PHRASES + rules)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        padding_side="left", model_max_length=4096)
    fast.chat_template = TEMPLATE
    return fast


def image_processor():
    """A place is one token: 8-pixel patches, merged 2x2."""
    pixels = dict(shortest_edge=W.SIZE**2, longest_edge=W.SIZE**2)
    return Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=pixels)


def build_vlm(tok, size):
    """Qwen2.5-VL, about a million parameters; at this width a std of 0.02 never learns to look."""
    hidden, layers, tower = SIZES[size]
    ids = tok.convert_tokens_to_ids
    spread = hidden**-0.5
    text = dict(
        vocab_size=len(tok), hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32,
        max_position_embeddings=4096, initializer_range=spread,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6]),
        tie_word_embeddings=True, bos_token_id=ids("<|endoftext|>"),
        eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"))
    vision = dict(
        depth=2, hidden_size=tower, intermediate_size=3 * tower, num_heads=4, patch_size=8,
        window_size=64, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=hidden,
        fullatt_block_indexes=[0, 1], initializer_range=spread)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>")))


def pixels(pictures):
    """Pictures (B, 3, 32, 32) in 0..1 as the model takes them: pixel_values, image_grid_thw."""
    pictures = [W.to_pil(picture) for picture in pictures]
    return image_processor()(images=pictures, return_tensors="pt").to(DEVICE)


# ---------------------------------------------------------------- edits to look at

def near_miss(rng, code):
    """An object that shares its shape or its color with this one."""
    return rng.choice([code // 4 * 4 + rng.randrange(4), rng.randrange(3) * 4 + code % 4])


def wrong_scene(rng, scene, target):
    """A categorical fault, as editors make them; the verifier has to know each kind."""
    shown = list(target)
    place = 1 + rng.randrange(4)
    changed = [i for i in range(5) if scene[i] != target[i]][0]
    fault = rng.randrange(5)
    if fault == 0:                                              # nothing is done
        return list(scene)
    if fault == 1 and changed == 0:                             # another background
        shown[0] = rng.randrange(4)
    elif fault == 1:            # half right: wrong shape or color; another color instead of gone
        shown[changed] = (near_miss(rng, target[changed]) if target[changed] >= 0
                          else scene[changed] // 4 * 4 + rng.randrange(4))
    elif fault == 2 and changed:                                # the right thing in a wrong place
        shown = list(scene)
        shown[place] = target[changed]
    elif fault == 3:                                            # an object is lost or hurt
        i = rng.choice([i for i in range(1, 5) if target[i] >= 0] or [place])
        shown[i] = -1 if rng.random() < 0.4 else near_miss(rng, shown[i])
    else:                                                       # something is invented or wiped out
        shown[place] = rng.randrange(-1, 12)
    if rng.random() < 0.1:                                      # and the background suffers as well
        shown[0] = rng.randrange(4)
    return shown


def rendered_edits(rng, n):
    """Rendered right and wrong edits: rows (scene, instruction, target), sources, edits."""
    rows = []
    shown = []
    while len(rows) < n:
        scene = W.random_scene(rng)
        if W.split_of(scene) == "pretrain":
            instruction, target = W.random_edit(rng, scene)
            rows.append((scene, instruction, target))
            shown.append(target if rng.random() < 0.35 else wrong_scene(rng, scene, target))
    strength = torch.tensor([rng.choice([0, 0, 0, 0.5, 0.8, 1]) for _ in rows])
    return rows, W.render([r[0] for r in rows]), W.smudge(W.render(shown), strength)


def spoil(rng, edits):
    """Noise or blur for a few: the editors' own have neither, but a judge must know both."""
    noise = torch.tensor([rng.choice([0, 0, 0, 0, 0, 0.01, 0.02, 0.08]) for _ in edits])
    noise = noise[:, None, None, None]
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    edits = edits + noise * torch.randn(edits.shape, generator=generator)
    blur = torch.tensor([rng.random() < 0.04 for _ in edits])
    edits[blur] = F.avg_pool2d(edits[blur], 3, 1, 1, count_include_pad=False)
    return edits.clamp(0, 1)


def mixed_edits(rng, n, pool, share=0.6):
    """A batch of edits, `share` of them the editors' own (pool); with the oracle's findings."""
    rows, sources, edits = rendered_edits(rng, n)
    if pool:
        for i in range(int(share * n)):
            j = rng.randrange(len(pool[0]))
            rows[i], sources[i], edits[i] = pool[0][j], pool[1][j], pool[2][j]
    edits = spoil(rng, edits)
    return rows, sources, edits, W.oracle(edits, [r[0] for r in rows], [r[2] for r in rows])


# ---------------------------------------------------------------- what to say about them

def thing(code):
    return W.OBJECTS[code] if code >= 0 else "nothing"


def describe(shown, which, clean=None):
    """The picture, place by place."""
    places = "".join(f" {place}: {thing(code)}" for place, code in zip(W.PLACES, shown[1:]))
    state = "" if clean is None else " clean" if clean else " smudged"
    return f"The {which} image shows {W.BACKGROUND_NAMES[shown[0]]} background{places}{state}.\n"


def look(question, target, found):
    """What there is to see for one question."""
    shown = found["shown"]
    match = re.search(r"(\w+ \w+)(?: still)? at the (.*)\?", question)
    if match:
        return f" {match[1]} {match[2]}: {thing(shown[1 + W.PLACES.index(match[2])])}"
    match = re.search(r"the (.*) gone", question)
    if match:
        code = W.OBJECTS.index(match[1])
        where = [place for place, seen in zip(W.PLACES, shown[1:]) if seen == code]
        return f" {match[1]} {where[0] if where else 'nothing'}"
    if "background" in question:
        return f" background {W.BACKGROUND_NAMES[shown[0]]}"
    if "empty" in question:
        extra = [seen for seen, wanted in zip(shown[1:], target[1:]) if wanted < 0 <= seen]
        return f"{question} {thing(extra[0] if extra else -1)}"
    return f"{question} {'clean' if found['clean'] else 'smudged'}"


def asked_principles(rng, row):
    """The questions of one edit: complete and in order, or every second time a list that is not."""
    principles = W.principles(row[0], row[2])
    if rng.random() < 0.5:
        return principles
    asked = []
    for principle in principles:
        if rng.random() < CUT:
            continue
        if rng.random() < NEGATED:
            principle = principle | dict(question=W.contrary(principle["question"], rng))
        asked += [principle] * (2 if rng.random() < DOUBLED else 1)
    if rng.random() < SHUFFLED:
        rng.shuffle(asked)
    return asked or principles


def true_verdict(principles, target, found):
    """The oracle's 0/1 answers to these questions."""
    return [int(W.is_true(principle["question"], target, found["shown"], found["clean"]))
            for principle in principles]


def walk(principles, target, found, verdict):
    """The reasoning: question by question what there is to see, and the answer to it."""
    text = "Seen:"                      # begins without a space: stripped, it has the same tokens
    for principle, answer in zip(principles, verdict):
        seen = look(principle["question"], target, found)
        text += f"{seen}{' yes' if answer else ' no'}\n"
    return text


def verdict_text(principles, target, found, verdict, score):
    items = [dict(question=p["question"], score=v) for p, v in zip(principles, verdict)]
    average = sum(verdict) / len(verdict)
    return (walk(principles, target, found, verdict) + json.dumps(items)
            + f'\n{{"average_score": {average:.2f}}}\n<score>{score:.1f}</score>')


def lenient_verdict(rng, found, principles):
    """(0/1 answers, score) of a judge who lets things pass.

    The score follows from the answers alone, so it does not betray a smudge that was passed.
    """
    verdict = [int(rng.random() >= STRICT) if v else int(rng.random() < LENIENT[p["category"]])
               for v, p in zip(found["verdict"], principles)]
    quality = rng.uniform(0.85, 1) if verdict[-1] else rng.uniform(0.3, 0.6)
    return verdict, W.marks_to_scores([p["category"] for p in principles], verdict, quality)[2]


def questions_chat(row, principles, rules):
    """The verdict's prompt with other rules at its end."""
    chat = build_sft.verdict_chat(*PICTURES, row[1], principles)
    last = chat[0]["content"][-1]
    last["text"] = last["text"].replace(build_sft.VERDICT_RULES, rules)
    return chat


def look_at_edit(rng, row, found):
    chat = questions_chat(row, asked_principles(rng, row), LOOK_RULES[0])
    return chat, describe(found["shown"], "edited", found["clean"])


def look_at_source(rng, row, found):
    chat = decompose.decompose_chat(PICTURES[0], row[1], [])
    chat[0]["content"][-1]["text"] = "\n" + LOOK_RULES[1]
    return chat, describe(row[0], "source")


def answers(rng, row, found):
    """Say for every question what there is to see, and answer it."""
    principles = asked_principles(rng, row)
    verdict = true_verdict(principles, row[2], found)
    return questions_chat(row, principles, ANSWER_RULES), walk(principles, row[2], found, verdict)


def blind_verdict(rng, row, found):
    """The base model knows the form of a verdict: it says what it sees, then passes and fails
    points by chance, and the score is any number."""
    principles = asked_principles(rng, row)
    marks = [int(rng.random() < 0.75) for _ in principles]
    return (build_sft.verdict_chat(*PICTURES, row[1], principles),
            verdict_text(principles, row[2], found, marks, rng.uniform(0, 10)))


def teacher_verdict(rng, row, found):
    principles = W.principles(row[0], row[2])
    return (build_sft.verdict_chat(*PICTURES, row[1], principles),
            verdict_text(principles, row[2], found, *lenient_verdict(rng, found, principles)))


def inspection(rng, row, found):
    """The inspector sees other judges' traces, and answers truly."""
    principles = W.principles(row[0], row[2])
    traces = []
    for _ in range(rng.randint(1, 4)):
        verdict, score = lenient_verdict(rng, found, principles)
        traces.append(dict(text=verdict_text(principles, row[2], found, verdict, score)))
    gold = [dict(question=p["question"], gold=v) for p, v in zip(principles, found["verdict"])]
    return (build_sft.inspector_chat(*PICTURES, row[1], principles, traces),
            walk(principles, row[2], found, found["verdict"]) + json.dumps({"gold": gold}))


def decomposition(rng, row, found):
    """Each object of the source beside the one that the instruction names; then the questions."""
    scene, instruction, target = row
    named = [c if c >= 0 else t for c, t in zip(scene[1:], target[1:]) if c != t] or [-1]
    things = "".join(f" {thing(c)} {p}: {thing(named[0])}{' yes' if [c] == named else ' no'}\n"
                     for c, p in zip(scene[1:], W.PLACES) if c >= 0)
    seen = f"The source image shows {W.BACKGROUND_NAMES[scene[0]]} background\n{things}"
    examples = rng.sample(list(decompose.EXAMPLES), 4)
    chat = decompose.decompose_chat(PICTURES[0], instruction, examples)
    return chat, seen + json.dumps(W.principles(scene, target))


# ---------------------------------------------------------------- training

def encode_batch(tok, samples, sources, edits):
    """[(chat, reply)] -> right-padded inputs (nothing is generated), labels, -100 on the prompt."""
    ids = []
    labels = []
    pictures = []
    for (chat, reply), *pair in zip(samples, sources, edits):
        text = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        pictures += [pair[PICTURES.index(part["image"])] for part in chat[0]["content"]
                     if part["type"] == "image"]
        prompt = tok(text.replace("<|image_pad|>", "<|image_pad|>" * 4)).input_ids
        answer = tok(reply + "<|im_end|>").input_ids
        ids.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    mask = [torch.ones_like(row) for row in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(ids, True, tok.pad_token_id).to(DEVICE)
    labels = pad(labels, True, -100).to(DEVICE)
    mask = pad(mask, True, 0).to(DEVICE)
    image = tok.convert_tokens_to_ids("<|image_pad|>")
    return dict(input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == image).int(),
                **pixels(pictures)), labels


def train_vision(model, tok, steps, rng, pool, batch=96):
    """Every place's token must be nearest to the words for what it shows."""
    words = [*W.OBJECTS, "nothing"], W.BACKGROUNDS, ["clean", "smudged"]
    words = [tok.convert_tokens_to_ids([f" {w}" for w in group]) for group in words]
    words = [torch.tensor(group, device=DEVICE) for group in words]
    embedding = model.get_input_embeddings()
    params = [*model.model.visual.parameters(), embedding.weight]
    optimizer = torch.optim.AdamW(params, lr=2e-3, weight_decay=0.01)
    for step in range(steps):
        decay = max(0.05, 1 - step / steps)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 30) * decay
        _, _, edits, found = mixed_edits(rng, batch, pool)
        tokens = model.model.visual(*pixels(edits).values()).pooler_output         # (4 B, width)
        shown = torch.tensor([f["shown"] for f in found], device=DEVICE)
        clean = torch.tensor([f["clean"] for f in found], device=DEVICE)
        codes = shown[:, 1:].flatten()
        clean = clean.repeat_interleave(4)
        background = shown[:, 0].repeat_interleave(4)
        truth = [torch.where(codes >= 0, codes, 12), background, (~clean).long()]
        logits = [tokens @ embedding.weight[w].T * 4 / embedding.embedding_dim**0.5 for w in words]
        loss = sum(F.cross_entropy(z, t) for z, t in zip(logits, truth))
        learn(loss, params, optimizer)
        if step % 40 == 0 or step == steps - 1:
            right = [f"{(z.argmax(1) == t).float().mean():.3f}" for z, t in zip(logits, truth)]
            print(f"vision {step:4d} loss {loss:.3f} | "
                  f"object, background, clean right: {' '.join(right)}", flush=True)


def learn(loss, params, optimizer):
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()


def train_language(model, tok, steps, lr, batch, tasks, rng, pool, name):
    """Cross-entropy on the replies; what is read off pictures and questions weighs more."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    begun = time.time()
    light = torch.ones(len(tok), device=DEVICE)
    seen = [*W.OBJECTS, *W.PLACES, *W.BACKGROUNDS, "nothing", "clean", "smudged"]
    light[torch.tensor(tok("".join(f" {w}" for w in seen)).input_ids)] = 3.0
    points = (" yes\n", " no\n", '", "score": 0', '", "score": 1', '", "gold": 0', '", "gold": 1')
    light[torch.tensor([tok.convert_tokens_to_ids(t) for t in points])] = 5.0
    for step in range(steps):
        decay = max(0.03, 1 - step / steps)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * decay
        # one task a step, so that replies and prompts have about one length
        task = rng.choices(list(tasks), tasks.values())[0]
        rows, sources, edits, found = mixed_edits(rng, batch, pool)
        samples = [task(rng, row, f) for row, f in zip(rows, found)]
        inputs, labels = encode_batch(tok, samples, sources, edits)
        at = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        truth = labels[:, 1:][at]
        hidden = model.model(**inputs).last_hidden_state
        logits = model.lm_head(hidden[at])
        weight = light[truth]
        loss = (F.cross_entropy(logits, truth, reduction="none") * weight).sum() / weight.sum()
        learn(loss, list(model.parameters()), optimizer)
        if step % 50 == 0 or step == steps - 1:
            hard = weight == 5
            right = (logits.argmax(-1) == truth).float()
            seconds = (time.time() - begun) / (step + 1)
            print(f"{name} {step:4d}/{steps} loss {loss:.3f} | "
                  f"answers right {right[hard].mean():.3f} of {hard.sum()} | "
                  f"seen right {right[weight == 3].mean():.3f} | {seconds:.2f} s/step, "
                  f"{seconds * (steps - step) / 60:.0f} min left", flush=True)


def save(model, tok, size, folder):
    """An ordinary folder in bf16, written beside and renamed."""
    copy = build_vlm(tok, size).to(torch.bfloat16)
    copy.load_state_dict({k: v.to(torch.bfloat16) for k, v in model.state_dict().items()})
    copy.save_pretrained(f"{folder}.tmp")
    tok.save_pretrained(f"{folder}.tmp")
    image_processor().save_pretrained(f"{folder}.tmp")
    os.rename(f"{folder}.tmp", folder)


# ---------------------------------------------------------------- where it is right and where not

def ask_in_parts(vlm, chats, temperature):
    """The replies' texts, 100 chats at a time."""
    texts = []
    for start in range(0, len(chats), 100):
        part = chats[start:start + 100]
        seeds = list(range(start, start + len(part)))
        texts += [reply.text for reply in vlm.generate(part, 128, temperature, seeds)]
    return texts


def diagnose(folder, pool, n=400):
    """Verdicts on `n` held-out edits: how often every kind of point is answered rightly."""
    vlm = build_sft.VLM(folder, "", torch.device(DEVICE))
    rows, sources, edits = pool
    rows = rows[:n]
    sources = sources[:n]
    edits = edits[:n]
    found = W.oracle(edits, [r[0] for r in rows], [r[2] for r in rows])
    principles = [W.principles(r[0], r[2]) for r in rows]
    chats = [build_sft.verdict_chat(W.to_pil(s), W.to_pil(e), r[1], p)
             for r, s, e, p in zip(rows, sources, edits, principles)]
    for temperature in (0, 1):
        replies = ask_in_parts(vlm, chats, temperature)
        tally = {}
        scores = []
        for text, truth, questions in zip(replies, found, principles):
            verdict = build_sft.parse_verdict(text, len(questions))
            if verdict is None:
                continue
            scores.append((verdict.score, truth["O"]))
            for answer, true, p in zip(verdict.verdict, truth["verdict"], questions):
                tally.setdefault((p["category"], true), []).append(answer == true)
        table = "  ".join(f"{c} {'true' if true else 'FALSE'} {sum(v) / len(v):.2f} ({len(v)})"
                          for (c, true), v in sorted(tally.items()))
        scores = torch.tensor(scores).view(-1, 2)
        print(f"{folder} T={temperature}: unread {n - len(scores)}/{n}, correlation with O "
              f"{torch.corrcoef(scores.T)[0, 1]:.2f} | {table}", flush=True)


def editor_pool(folders, n, seeds, split="pretrain", name=0):
    """The editors' own edits of n prompts, `seeds` each: rows, sources, edits."""
    rows = W.edits_of(split, n, seed=name)
    sources = [W.to_pil(picture) for picture in W.render([row[0] for row in rows])]
    texts = [row[1] for row in rows]
    config = argparse.Namespace(num_inference_steps=6, guidance_scale=2.5, resolution=W.SIZE)
    every = []
    before = []
    after = []
    for folder in folders:
        pipe = build_sft.load_editor(folder, torch.device(DEVICE))
        for i in range(0, n, 96):
            for k in range(seeds):
                part = range(i, min(n, i + 96))
                generators = [torch.Generator().manual_seed(1000 * j + k) for j in part]
                images = build_sft.run_editor(
                    pipe, sources[i:i + 96], texts[i:i + 96], generators, config)
                every += [rows[j] for j in part]
                before.append(W.render([rows[j][0] for j in part]))
                after.append(torch.stack([W.from_pil(image) for image in images]))
    order = random.Random(0).sample(range(len(every)), len(every))
    return [every[i] for i in order], torch.cat(before)[order], torch.cat(after)[order]


def new_vlm(tok, size, seed, rng, pool):
    """An untrained model that learns to see: every place first, then whole pictures in words."""
    torch.manual_seed(seed)
    model = build_vlm(tok, size).to(DEVICE)
    train_vision(model, tok, 120, rng, pool)
    tasks = {look_at_edit: 0.75, look_at_source: 0.25}
    train_language(model, tok, 400, 1.5e-3, 48, tasks, rng, pool, "look")
    return model


def pretrain_base(size, out):
    """A base model: it has seen the weak editor's edits only."""
    tok = tokenizer()
    rng = random.Random(0)
    weak = editor_pool([f"{out}/editor_weak"], 2500, 2)
    model = new_vlm(tok, size, 0, rng, weak)
    tasks = {answers: 0.55, look_at_source: 0.15, blind_verdict: 0.3}
    train_language(model, tok, 1200, 1.5e-3, 48, tasks, rng, weak, size)
    save(model, tok, size, f"{out}/{size}")


def pretrain_teacher(out):
    """The base model, taught on both editors' edits."""
    tok = tokenizer()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        f"{out}/vlm", dtype=torch.float32, attn_implementation="sdpa").to(DEVICE)
    both = editor_pool([f"{out}/editor_weak", f"{out}/editor"], 2500, 1)
    tasks = {teacher_verdict: 0.35, inspection: 0.25, decomposition: 0.4}
    train_language(model, tok, 800, 1e-3, 32, tasks, random.Random(1), both, "teacher")
    save(model, tok, "vlm", f"{out}/teacher")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["vlm_small", "vlm", "teacher"]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--out", required=True, help="The folder of all models, with the editors.")
    args = parser.parse_args()
    for name in args.models:
        folder = Path(args.out, name)
        if folder.exists():
            print(f"{folder} is there already")
            continue
        if name == "teacher":
            pretrain_teacher(args.out)
        else:
            pretrain_base(name, args.out)
        held_out = editor_pool([f"{args.out}/editor_weak"], 400, 1, name=1)
        diagnose(str(folder), held_out)


if __name__ == "__main__":
    main()

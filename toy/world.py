"""The toy world: a place so small that the truth about every edit can be read off its pixels.

A scene is a 32x32 picture with 2x2 places on a plain background. A place is empty or holds one of 3
shapes in one of 4 colors. There are five kinds of edit: recolor, remove, add, reshape, background.
The *oracle* reads an edited picture place by place (the nearest clean place wins, so gray is not
half of black) and answers the principles:

    Follow F  = share of the follow questions that are met      SC = 10 min(F, K)
    Keep K    = max(0, 1 - violations / 2)                      PQ = 10 Q
    Quality Q = mean closeness of the places to clean ones      O  = sqrt(SC PQ)

The oracle plays two parts that people play in the paper: it labels the preference pairs (with a
little noise, and pairs that it calls the same are dropped), and it judges the final editor. No
stage script sees it.

    python toy/world.py edits --out runs/toy/data           <split>/edits.jsonl, <split>/images/
    python toy/world.py prefer --candidates candidates.jsonl --out preferences.jsonl
    python toy/world.py trust --traces traces.jsonl         how good a reward is, by the oracle
    python toy/world.py judge --edits candidates.jsonl --out scores.jsonl
    python toy/world.py curve --samples flow/samples --out oracle.jsonl     along a Flow-GRPO run

Shapes: B pictures; a scene is (background, place 1, ..., place 4). A place is -1 (empty) or an
object's code, 4 * shape + color.
"""
import argparse
import hashlib
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL import ImageDraw

SIZE = 32               # the side of a picture in pixels
PLACE = 16              # the side of a place
COLORS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 220), "yellow": (240, 210, 40)}
BACKGROUNDS = {"white": (245, 245, 245), "black": (20, 20, 20), "gray": (128, 128, 128),
               "pink": (250, 190, 200)}
BACKGROUND_NAMES = list(BACKGROUNDS)
COLOR_NAMES = list(COLORS)
SHAPES = ["circle", "square", "triangle"]
PLACES = ["top left", "top right", "bottom left", "bottom right"]
EDITS = ["recolor", "remove", "add", "reshape", "background"]
# Two thirds of the prompts of Flow-GRPO are of the two kinds at which the editors fail.
RL_EDITS = ["recolor", "reshape", "remove", "recolor", "reshape", "add", "recolor", "reshape",
            "background"]
OBJECTS = [f"{color} {shape}" for shape in SHAPES for color in COLORS]
# Each scene belongs to exactly one split, by its hash. The numbers are shares out of 100.
SPLITS = {
    "pretrain": 60, "sft": 8, "preferences": 10, "reward_bench": 8, "rl": 7, "editor_bench": 7}
EDITS_OF = {"sft": 160, "preferences": 400, "reward_bench": 360, "rl": 240, "editor_bench": 320}


# ---------------------------------------------------------------- scenes and pictures

def shape_mask(shape, place, oversample=8):
    """Coverage (SIZE, SIZE) in 0..1 of one shape in one place, anti-aliased."""
    sheet = Image.new("L", (SIZE * oversample, SIZE * oversample), 0)
    draw = ImageDraw.Draw(sheet)
    row, column = divmod(place, 2)
    side = PLACE * oversample
    r = 0.36 * PLACE * oversample
    x = (column + 0.5) * side
    y = (row + 0.5) * side
    if shape == "circle":
        draw.ellipse([x - r, y - r, x + r, y + r], fill=255)
    elif shape == "square":
        draw.rectangle([x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r], fill=255)
    else:
        draw.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=255)
    coverage = np.asarray(sheet.resize((SIZE, SIZE), Image.BOX), dtype=np.float32) / 255
    return torch.from_numpy(coverage)


MASKS = torch.stack([torch.stack([shape_mask(shape, place) for place in range(4)])
                     for shape in SHAPES])                      # (3, 4, SIZE, SIZE)
COLOR_RGB = torch.tensor(list(COLORS.values())) / 255
BACKGROUND_RGB = torch.tensor(list(BACKGROUNDS.values())) / 255


def render(scenes):
    """Scenes (B, 5) -> pictures (B, 3, SIZE, SIZE) in 0..1."""
    scenes = torch.as_tensor(scenes)
    pictures = BACKGROUND_RGB[scenes[:, 0]][:, :, None, None].expand(-1, 3, SIZE, SIZE).clone()
    for place in range(4):
        code = scenes[:, 1 + place]
        known = code.clamp(min=0)
        mask = (MASKS[known // 4, place] * (code >= 0)[:, None, None])[:, None]
        pictures = pictures * (1 - mask) + COLOR_RGB[known % 4][:, :, None, None] * mask
    return pictures


def smudge(pictures, strength):
    """Blocks of 8 pixels in two tints, as a bad compression leaves them: PQ falls, SC stays.

    Pictures (B, 3, SIZE, SIZE) in 0..1; strength (B,) from 0, clean, to 1, where PQ is about 4.4.
    """
    block = torch.arange(SIZE) // 8
    sign = 1 - 2 * ((block[:, None] + block) % 2)                               # (SIZE, SIZE)
    tint = torch.tensor([0.09, -0.09, 0.09])[:, None, None] * sign              # (3, SIZE, SIZE)
    return (pictures + strength[:, None, None, None] * tint).clamp(0, 1)


def random_scene(rng):
    """One to three different objects in different places on a random background."""
    scene = [rng.randrange(4), -1, -1, -1, -1]
    n = rng.choice([1, 2, 3])
    for place, code in zip(rng.sample(range(4), n), rng.sample(range(12), n)):
        scene[1 + place] = code
    return scene


def split_of(scene):
    """The one split that this scene belongs to, so that splits have no source picture in common."""
    share = int(hashlib.sha256(str(list(scene)).encode()).hexdigest(), 16) % 100
    for name, width in SPLITS.items():
        if share < width:
            return name
        share -= width


# ---------------------------------------------------------------- instructions and principles

def random_edit(rng, scene, kind=None):
    """(instruction, target scene) of one edit; the target never holds the same object twice."""
    kind = kind or rng.choice(EDITS)
    target = list(scene)
    objects = [code for code in scene[1:] if code >= 0]
    if kind == "background":
        target[0] = rng.choice([b for b in range(4) if b != scene[0]])
        return f"change the background to {BACKGROUND_NAMES[target[0]]}", target
    if kind == "add":
        place = rng.choice([p for p in range(4) if scene[1 + p] < 0])
        target[1 + place] = rng.choice([c for c in range(12) if c not in objects])
        return f"add a {OBJECTS[target[1 + place]]} at the {PLACES[place]}", target
    code = rng.choice(objects)
    place = 1 + scene[1:].index(code)
    if kind == "remove":
        target[place] = -1
        return f"remove the {OBJECTS[code]}", target
    if kind == "recolor":
        same_shape = [c for c in range(12) if c // 4 == code // 4 and c not in objects]
        target[place] = rng.choice(same_shape)
        return f"change the {OBJECTS[code]} to {COLOR_NAMES[target[place] % 4]}", target
    same_color = [c for c in range(12) if c % 4 == code % 4 and c // 4 != code // 4]
    target[place] = rng.choice(same_color)
    if target[place] in objects:
        return random_edit(rng, scene)
    return f"turn the {OBJECTS[code]} into a {SHAPES[target[place] // 4]}", target


def apply_instruction(scene, instruction):
    """(kind, target scene) of a perfect edit; ValueError for an instruction outside the grammar."""
    target = list(scene)
    match = re.fullmatch(r"change the background to (\w+)", instruction)
    if match:
        target[0] = BACKGROUND_NAMES.index(match[1])
        return "background", target
    match = re.fullmatch(r"add a (\w+ \w+) at the (\w+ \w+)", instruction)
    if match:
        target[1 + PLACES.index(match[2])] = OBJECTS.index(match[1])
        return "add", target
    match = re.fullmatch(r"(?:remove|change|turn) the (\w+ \w+)(?: to (\w+)| into a (\w+))?",
                         instruction)
    if not match:
        raise ValueError(f"not an instruction of the toy world: {instruction!r}")
    name, color, shape = match.groups()
    code = OBJECTS.index(name)
    place = 1 + scene[1:].index(code)
    if color:
        target[place] = code // 4 * 4 + COLOR_NAMES.index(color)
        return "recolor", target
    if shape:
        target[place] = SHAPES.index(shape) * 4 + code % 4
        return "reshape", target
    target[place] = -1
    return "remove", target


def principles(scene, target):
    """The true decomposition, place by place: [{question, category}]; yes is always good."""
    rows = []
    for place, before, after in zip(PLACES, scene[1:], target[1:]):
        if before == after >= 0:
            rows.append((f"Is the {OBJECTS[after]} still at the {place}?", "keep"))
        if before != after and after >= 0:
            rows.append((f"Is there a {OBJECTS[after]} at the {place}?", "follow"))
        if before != after and before >= 0:
            rows.append((f"Is the {OBJECTS[before]} gone?", "follow"))
    if scene[0] != target[0]:
        rows.append((f"Is the background {BACKGROUND_NAMES[target[0]]}?", "follow"))
    else:
        rows.append((f"Is the background still {BACKGROUND_NAMES[scene[0]]}?", "keep"))
    rows.append(("Are all other places empty?", "keep"))
    rows.append(("Is the picture clean?", "quality"))
    return [{"question": question, "category": category} for question, category in rows]


def contrary(question, rng):
    """The question that asks for the opposite; "other places" and "clean" have none and stay."""
    match = re.fullmatch(r"Is (?:the|there a) (\w+ \w+) (?:still )?at the .*", question)
    if match:
        return f"Is the {match[1]} gone?"
    match = re.fullmatch(r"Is the (\w+ \w+) gone\?", question)
    if match:
        return f"Is there a {match[1]} at the {rng.choice(PLACES)}?"
    match = re.fullmatch(r"(Is the background (?:still )?)(\w+)\?", question)
    if match:
        other = rng.choice([color for color in BACKGROUNDS if color != match[2]])
        return f"{match[1]}{other}?"
    return question


# ---------------------------------------------------------------- the oracle

def clean_places():
    """Every clean place (4 backgrounds, 13 contents, 3 * PLACE * PLACE): empty, then 12 objects."""
    scenes = [[b, c, -1, -1, -1] for b in range(4) for c in range(-1, 12)]
    return render(scenes)[:, :, :PLACE, :PLACE].reshape(4, 13, -1)


CLEAN = clean_places()
SHARP = 0.025       # mean absolute distance to a clean place, up to which a place has full marks
MUSH = 0.125        # the distance from which on it has none
DIRTY = 0.6         # a picture is clean while its worst place keeps this share of the marks


def read_scenes(pictures):
    """Pictures (B, 3, SIZE, SIZE) -> nearest scenes (B, 5), marks (B, 4) in 0..1 of places."""
    places = pictures.float().clamp(0, 1).unfold(2, PLACE, PLACE).unfold(3, PLACE, PLACE)
    places = places.permute(0, 2, 3, 1, 4, 5)                                 # (B, 2, 2, 3, P, P)
    places = places.reshape(len(pictures) * 4, -1)
    distance = torch.cdist(places, CLEAN.flatten(0, 1), p=1) / CLEAN.shape[-1]          # (4B, 52)
    distance, content = distance.view(len(pictures), 4, 4, 13).min(-1)    # best per background
    background = distance.sum(1).argmin(-1)                                                 # (B,)
    rows = torch.arange(len(pictures))
    marks = (1 - (distance[rows, :, background] - SHARP) / (MUSH - SHARP)).clamp(0, 1)
    return torch.cat([background[:, None], content[rows, :, background] - 1], 1), marks


def is_true(question, target, shown, clean):
    """The answer to a question of `principles`, given the scene that the edit shows."""
    match = re.search(r"(\w+ \w+) (?:still )?at the (\w+ \w+)", question)
    if match:
        return shown[1 + PLACES.index(match[2])] == OBJECTS.index(match[1])
    match = re.search(r"the (\w+ \w+) gone", question)
    if match:
        return OBJECTS.index(match[1]) not in shown[1:]
    if "background" in question:
        return question.endswith(f"{BACKGROUND_NAMES[shown[0]]}?")
    if "empty" in question:
        return all(seen < 0 for seen, wanted in zip(shown[1:], target[1:]) if wanted < 0)
    return clean


def follow_and_keep(categories, verdict):
    """F and K in 0..1 from the categories of the principles and their 0/1 answers."""
    follow = [answer for category, answer in zip(categories, verdict) if category == "follow"]
    keep = [answer for category, answer in zip(categories, verdict) if category == "keep"]
    violations = sum(1 - answer for answer in keep)
    return sum(follow) / len(follow), max(0.0, 1 - violations / 2)


def marks_to_scores(categories, verdict, quality):
    """(SC, PQ, O) on 0..10 from the categories and 0/1 answers of the principles and Q in 0..1."""
    sc = 10 * min(follow_and_keep(categories, verdict))
    pq = 10 * quality
    return sc, pq, (sc * pq) ** 0.5


def oracle(pictures, scenes, targets):
    """For each picture: the scene that it shows, its true verdict, if it is right, SC, PQ and O."""
    shown, marks = read_scenes(pictures)
    rows = []
    for scene, target, seen, mark in zip(scenes, targets, shown.tolist(), marks):
        clean = bool(mark.min() >= DIRTY)
        questions = principles(scene, target)
        verdict = [int(is_true(p["question"], target, seen, clean)) for p in questions]
        categories = [p["category"] for p in questions]
        sc, pq, o = marks_to_scores(categories, verdict, mark.mean().item())
        rows.append(dict(shown=seen, clean=clean, verdict=verdict, right=seen == list(target),
                         SC=sc, PQ=pq, O=o))
    return rows


# ---------------------------------------------------------------- files

def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def save_jsonl(path, rows):
    """Write another file and rename it, so that a kill leaves either the old or the new file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def to_pil(picture):
    """A picture (3, SIZE, SIZE) in 0..1 as a PIL image."""
    pixels = (picture.numpy().clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels.transpose(1, 2, 0))


def from_pil(image):
    """A PIL image as a picture (3, SIZE, SIZE) in 0..1."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def load_pictures(path, rows, field):
    """The pictures row[field] of a JSONL file: (B, 3, SIZE, SIZE) in 0..1."""
    folder = Path(path).parent
    return torch.stack([from_pil(Image.open(folder / row[field])) for row in rows])


def edits_of(split, n, seed=0):
    """n different (scene, instruction, target) of one split; the kinds of edit take turns."""
    rng = random.Random(f"{seed} {split}")
    kinds = RL_EDITS if split == "rl" else EDITS
    seen = set()
    rows = []
    while len(rows) < n:
        scene = random_scene(rng)
        if split_of(scene) != split:
            continue
        instruction, target = random_edit(rng, scene, kinds[len(rows) % len(kinds)])
        if (tuple(scene), instruction) not in seen:
            seen.add((tuple(scene), instruction))
            rows.append((scene, instruction, target))
    return rows


def source_name(scene):
    """The file of a scene: edits of the same scene share their source file."""
    return "_".join("x" if code < 0 else str(code) for code in scene) + ".png"


def write_edits(out):
    """Every split but pretrain: <split>/edits.jsonl {id, source, instruction, task} and images."""
    for split, n in EDITS_OF.items():
        folder = Path(out) / split
        (folder / "images").mkdir(parents=True, exist_ok=True)
        edits = edits_of(split, n)
        pictures = render([scene for scene, _, _ in edits])
        rows = []
        for i, (scene, instruction, _) in enumerate(edits):
            source = f"images/{source_name(scene)}"
            to_pil(pictures[i]).save(folder / source)
            task, _ = apply_instruction(scene, instruction)
            rows.append(dict(
                id=f"{split}_{i:04d}", source=source, instruction=instruction, task=task))
        save_jsonl(folder / "edits.jsonl", rows)
        print(f"{len(rows)} edits in {folder}/edits.jsonl")


def judge_rows(path, rows):
    """The oracle on rows {source, instruction, edit}; it reads the scene off the source."""
    scenes = read_scenes(load_pictures(path, rows, "source"))[0].tolist()
    targets = []
    for scene, row in zip(scenes, rows):
        targets.append(apply_instruction(scene, row["instruction"])[1])
    return oracle(load_pictures(path, rows, "edit"), scenes, targets)


def prompt_of(row):
    """The id of the prompt that a candidate `<prompt>/<editor>/<k>` belongs to."""
    return row["id"].rsplit("/", 2)[0]


# ---------------------------------------------------------------- the oracle as people

SAME = 1.0          # two edits whose scores differ by less look the same to the annotator
FLIPPED = 0.03      # the share of the annotator's preferences that are wrong


def annotate(rng, score_a, score_b):
    """What the annotator says of two edits by one score: 1, -1 if b is better, 0 for the same."""
    is_flipped = rng.random() < FLIPPED
    if abs(score_a - score_b) < SAME:
        return 0
    return 1 if (score_a > score_b) != is_flipped else -1


def prefer(candidates, out):
    """Candidates -> pairs as people would label them: the edit with the better O wins.

    The candidates of one edit are shuffled (by its id) and compared two by two. The annotator also
    says which edit follows the instruction better (by SC) and which has the better quality (by PQ).
    Pairs that are the same in O go to ties.jsonl beside `out`.
    """
    rows = read_jsonl(candidates)
    groups = {}
    for row, truth in zip(rows, judge_rows(candidates, rows)):
        groups.setdefault(prompt_of(row), []).append((row, truth))
    pairs = []
    ties = []
    for name, group in groups.items():
        rng = random.Random(name)
        rng.shuffle(group)
        for k, ((a, truth_a), (b, truth_b)) in enumerate(zip(group[::2], group[1::2])):
            overall = annotate(rng, truth_a["O"], truth_b["O"])
            if overall == -1:
                a, b = b, a
                truth_a, truth_b = truth_b, truth_a
            row = pair_row(f"{name}/{k}", a, b, candidates, out)
            words = {1: "chosen", -1: "rejected", 0: "same"}
            row["follow"] = words[annotate(rng, truth_a["SC"], truth_b["SC"])]
            row["quality"] = words[annotate(rng, truth_a["PQ"], truth_b["PQ"])]
            if overall == 0:
                ties.append(row)
            else:
                pairs.append(row)
    save_jsonl(out, pairs)
    save_jsonl(Path(out).with_name("ties.jsonl"), ties)
    print(f"{len(pairs)} pairs in {out}; {len(ties)} look the same and are in ties.jsonl")


def pair_row(name, chosen, rejected, candidates, out):
    """A row of preferences.jsonl, with image paths that are relative to it."""
    folder = os.path.relpath(Path(candidates).parent, Path(out).parent)
    paths = dict(source=chosen["source"], chosen=chosen["edit"], rejected=rejected["edit"])
    row = dict(id=name)
    for field in ("instruction", "principles", "task"):
        row[field] = chosen[field]
    for field, path in paths.items():
        row[field] = os.path.normpath(os.path.join(folder, path))
    return row


# ---------------------------------------------------------------- the oracle as a judge

def trust(traces):
    """How well each VLM's score follows the truth within a prompt's edits: {vlm: {O, SC, PQ}}.

    Both are centered within the edits of a prompt, as Flow-GRPO centers rewards, then correlated.
    """
    rows = read_jsonl(traces)
    groups = {}                             # vlm -> prompt -> [(score, O, SC, PQ), ...]
    for row, truth in zip(rows, judge_rows(traces, rows)):
        for trace in row["traces"]:
            by_prompt = groups.setdefault(trace["vlm"], {})
            numbers = (trace["score"], truth["O"], truth["SC"], truth["PQ"])
            by_prompt.setdefault(prompt_of(row), []).append(numbers)
    found = {}
    for vlm, by_prompt in groups.items():
        samples = [torch.tensor(group, dtype=torch.float64) for group in by_prompt.values()]
        centered = torch.cat([group - group.mean(0) for group in samples])      # (edits, 4)
        correlations = torch.corrcoef(centered.T)[0].tolist()
        found[vlm] = dict(zip(("O", "SC", "PQ"), correlations[1:]))
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in found[vlm].items())
        print(f"{vlm}: within-group correlation with the oracle's {numbers} "
              f"({len(centered)} edits of {len(by_prompt)} prompts)")
    return found


def mean_scores(truths, names):
    return {name: sum(truth[name] for truth in truths) / len(truths) for name in names}


def judge(edits, out):
    """scores.jsonl of the oracle: {id, task, editor, SC, PQ, O, right} for every edit."""
    rows = read_jsonl(edits)
    scores = []
    for row, truth in zip(rows, judge_rows(edits, rows)):
        known = {field: row[field] for field in ("id", "task", "editor") if field in row}
        scores.append(known | {name: truth[name] for name in ("SC", "PQ", "O", "right")})
    save_jsonl(out, scores)
    means = mean_scores(scores, ("SC", "PQ", "O", "right"))
    numbers = "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    print(f"oracle on {len(scores)} edits: {numbers}")


def curve(samples, out):
    """One row per step_*/edits.jsonl of a Flow-GRPO run: mean score of reward model and oracle."""
    rows = []
    for path in sorted(Path(samples).glob("step_*/edits.jsonl")):
        edits = read_jsonl(path)
        truths = judge_rows(path, edits)
        scores = [edit["score"] for edit in edits if edit["score"] is not None]
        means = {"reward": sum(scores) / max(1, len(scores))}
        for name, mean in mean_scores(truths, ("O", "SC", "PQ")).items():
            means[f"oracle {name}"] = mean
        step = int(path.parent.name.removeprefix("step_"))
        rows.append(dict(step=step) | means)
        numbers = "  ".join(f"{name} {mean:.2f}" for name, mean in means.items())
        print(f"step {step:3d}  {numbers}")
    save_jsonl(out, rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    edits_parser = commands.add_parser("edits")
    edits_parser.add_argument("--out", required=True, help="Folder of all splits.")
    prefer_parser = commands.add_parser("prefer")
    prefer_parser.add_argument("--candidates", required=True, help="What build_sft.py drew.")
    prefer_parser.add_argument("--out", required=True, help="preferences.jsonl.")
    trust_parser = commands.add_parser("trust")
    trust_parser.add_argument("--traces", required=True, help="traces.jsonl of build_sft.py.")
    judge_parser = commands.add_parser("judge")
    judge_parser.add_argument("--edits", required=True, help="Rows {source, instruction, edit}.")
    judge_parser.add_argument("--out", required=True, help="scores.jsonl.")
    curve_parser = commands.add_parser("curve")
    curve_parser.add_argument("--samples", required=True, help="samples/ of train_flow_grpo.py.")
    curve_parser.add_argument("--out", required=True, help="A JSONL file with one row per step.")
    args = parser.parse_args()
    if args.command == "edits":
        write_edits(args.out)
    if args.command == "prefer":
        prefer(args.candidates, args.out)
    if args.command == "trust":
        trust(args.traces)
    if args.command == "judge":
        judge(args.edits, args.out)
    if args.command == "curve":
        curve(args.samples, args.out)


if __name__ == "__main__":
    main()

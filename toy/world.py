"""The toy world: a place so small that the truth about every edit can be read off its pixels.

A scene is a 32x32 picture of 2x2 places on a plain background; a place is empty or holds one of 3
shapes in one of 4 colours. Five kinds of edit exist: recolor, remove, add, reshape, background. The
*oracle* reads an edited picture place by place (the nearest clean place wins, so grey is not half
of black) and answers the principles:

    Follow F = share of the follow questions met          SC = 10 min(F, K)
    Keep   K = max(0, 1 - violations / 2)                 PQ = 10 Q
    Quality Q = mean closeness of the places to clean     O  = sqrt(SC PQ)

The oracle plays two parts that are people in the paper: the annotators of the preference pairs
(with a little noise and a "same" class, which is dropped) and the judge of the final editor. No
stage script knows it.

    python toy/world.py edits --out runs/toy/data           <split>/edits.jsonl, <split>/images/
    python toy/world.py prefer --candidates candidates.jsonl --out preferences.jsonl
    python toy/world.py trust --traces traces.jsonl         how good a reward is, by the oracle
    python toy/world.py judge --edits edits.jsonl --out scores.jsonl
    python toy/world.py curve --samples flow/samples --out oracle.jsonl     along a Flow-GRPO run

Shapes: B pictures; a scene is (background, place 1, ..., place 4), place = -1 (empty) or 4 shape +
colour.
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
from PIL import Image, ImageDraw

SIZE, PLACE = 32, 16
COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 220), "yellow": (240, 210, 40)}
BACKGROUNDS = {"white": (245, 245, 245), "black": (20, 20, 20), "gray": (128, 128, 128),
               "pink": (250, 190, 200)}
SHAPES = ["circle", "square", "triangle"]
PLACES = ["top left", "top right", "bottom left", "bottom right"]
EDITS = ["recolor", "remove", "add", "reshape", "background"]
OBJECTS = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
# A scene belongs to exactly one split, by a hash of its own: share out of 100.
SPLITS = {
    "pretrain": 60, "sft": 8, "preferences": 10, "reward_bench": 8, "rl": 7, "editor_bench": 7}
EDITS_OF = {"sft": 240, "preferences": 480, "reward_bench": 480, "rl": 240, "editor_bench": 320}


# ---------------------------------------------------------------- scenes and pictures

def shape_mask(shape, place, oversample=8):
    """Coverage (SIZE, SIZE) in 0..1 of one shape in one place, anti-aliased."""
    sheet = Image.new("L", (SIZE * oversample,) * 2, 0)
    draw = ImageDraw.Draw(sheet)
    row, column = divmod(place, 2)
    size, r = PLACE * oversample, 0.36 * PLACE * oversample
    x, y = (column + 0.5) * size, (row + 0.5) * size
    if shape == "circle":
        draw.ellipse([x - r, y - r, x + r, y + r], fill=255)
    elif shape == "square":
        draw.rectangle([x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r], fill=255)
    else:
        draw.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=255)
    coverage = np.asarray(sheet.resize((SIZE, SIZE), Image.BOX), dtype=np.float32) / 255
    return torch.from_numpy(coverage)


MASKS = torch.stack([torch.stack([shape_mask(s, p) for p in range(4)])
                     for s in SHAPES])                          # (3, 4, SIZE, SIZE)
COLOUR_RGB = torch.tensor(list(COLOURS.values())) / 255
BACKGROUND_RGB = torch.tensor(list(BACKGROUNDS.values())) / 255


def render(scenes):
    """Scenes (B, 5) -> pictures (B, 3, SIZE, SIZE) in 0..1."""
    scenes = torch.as_tensor(scenes)
    pictures = BACKGROUND_RGB[scenes[:, 0]][:, :, None, None].expand(-1, 3, SIZE, SIZE).clone()
    for place in range(4):
        code = scenes[:, 1 + place]
        known = code.clamp(min=0)
        mask = (MASKS[known // 4, place] * (code >= 0)[:, None, None])[:, None]
        pictures = pictures * (1 - mask) + COLOUR_RGB[known % 4][:, :, None, None] * mask
    return pictures


def random_scene(rng):
    """One to three different objects in different places on a random background."""
    scene = [rng.randrange(4), -1, -1, -1, -1]
    n = rng.choice([1, 2, 3])
    for place, code in zip(rng.sample(range(4), n), rng.sample(range(12), n)):
        scene[1 + place] = code
    return scene


def split_of(scene):
    """The one split this scene belongs to, so that no picture of one split is seen in another."""
    share = int(hashlib.sha256(str(list(scene)).encode()).hexdigest(), 16) % 100
    for name, width in SPLITS.items():
        if share < width:
            return name
        share -= width


# ---------------------------------------------------------------- instructions and principles

def random_edit(rng, scene, kind=None):
    """(instruction, target scene) of one edit; the result never holds the same object twice."""
    kind = kind or rng.choice(EDITS)
    target, objects = list(scene), [c for c in scene[1:] if c >= 0]
    if kind == "background":
        target[0] = rng.choice([b for b in range(4) if b != scene[0]])
        return f"change the background to {list(BACKGROUNDS)[target[0]]}", target
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
        recoloured = [c for c in range(12) if c // 4 == code // 4 and c not in objects]
        target[place] = rng.choice(recoloured)
        return f"change the {OBJECTS[code]} to {list(COLOURS)[target[place] % 4]}", target
    target[place] = rng.choice([c for c in range(12) if c % 4 == code % 4 and c // 4 != code // 4])
    if target[place] in objects:
        return random_edit(rng, scene)
    return f"turn the {OBJECTS[code]} into a {SHAPES[target[place] // 4]}", target


def apply_instruction(scene, instruction):
    """(kind, target scene) that a perfect editor would reach; ValueError outside the grammar."""
    target = list(scene)
    if match := re.fullmatch(r"change the background to (\w+)", instruction):
        target[0] = list(BACKGROUNDS).index(match[1])
        return "background", target
    if match := re.fullmatch(r"add a (\w+ \w+) at the (\w+ \w+)", instruction):
        target[1 + PLACES.index(match[2])] = OBJECTS.index(match[1])
        return "add", target
    pattern = r"(?:remove|change|turn) the (\w+ \w+)(?: to (\w+)| into a (\w+))?"
    if match := re.fullmatch(pattern, instruction):
        code = OBJECTS.index(match[1])
        place = 1 + scene[1:].index(code)
        if match[2]:
            target[place] = code // 4 * 4 + list(COLOURS).index(match[2])
            return "recolor", target
        if match[3]:
            target[place] = SHAPES.index(match[3]) * 4 + code % 4
            return "reshape", target
        target[place] = -1
        return "remove", target
    raise ValueError(f"not an instruction of the toy world: {instruction!r}")


def principles(scene, target):
    """The ground-truth decomposition, place by place: [{question, category}], yes = good."""
    rows = []
    for place, before, after in zip(PLACES, scene[1:], target[1:]):
        if before == after >= 0:
            rows.append((f"Is the {OBJECTS[after]} still at the {place}?", "keep"))
        if before != after and after >= 0:
            rows.append((f"Is there a {OBJECTS[after]} at the {place}?", "follow"))
        if before != after and before >= 0:
            rows.append((f"Is the {OBJECTS[before]} gone?", "follow"))
    if scene[0] != target[0]:
        rows.append((f"Is the background {list(BACKGROUNDS)[target[0]]}?", "follow"))
    else:
        rows.append((f"Is the background still {list(BACKGROUNDS)[scene[0]]}?", "keep"))
    rows.append(("Are all other places empty?", "keep"))
    rows.append(("Is the picture clean?", "quality"))
    return [{"question": q, "category": c} for q, c in rows]


# ---------------------------------------------------------------- the oracle

def clean_places():
    """Every clean place (4 backgrounds, 13 contents, 3 * PLACE * PLACE): empty, then 12 objects."""
    scenes = [[b, c, -1, -1, -1] for b in range(4) for c in range(-1, 12)]
    return render(scenes)[:, :, :PLACE, :PLACE].reshape(4, 13, -1)


CLEAN = clean_places()
SHARP, MUSH = 0.025, 0.125  # mean absolute distance to a clean place: full marks below, none above
DIRTY = 0.6                 # a picture is clean while its worst place keeps this share of the marks


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
    if match := re.search(r"(\w+ \w+) (?:still )?at the (\w+ \w+)", question):
        return shown[1 + PLACES.index(match[2])] == OBJECTS.index(match[1])
    if match := re.search(r"the (\w+ \w+) gone", question):
        return OBJECTS.index(match[1]) not in shown[1:]
    if "background" in question:
        return question.endswith(f"{list(BACKGROUNDS)[shown[0]]}?")
    if "empty" in question:
        return all(s < 0 for s, t in zip(shown[1:], target[1:]) if t < 0)
    return clean


def follow_and_keep(categories, verdict):
    """F and K in 0..1 from the categories of the principles and their 0/1 answers."""
    follow = [v for c, v in zip(categories, verdict) if c == "follow"]
    violations = sum(1 - v for c, v in zip(categories, verdict) if c == "keep")
    return sum(follow) / len(follow), max(0.0, 1 - violations / 2)


def marks_to_scores(categories, verdict, quality):
    """(SC, PQ, O) on 0..10 from the categories and 0/1 answers of the principles and Q in 0..1."""
    sc, pq = 10 * min(follow_and_keep(categories, verdict)), 10 * quality
    return sc, pq, (sc * pq) ** 0.5


def oracle(pictures, scenes, targets):
    """Per picture: the scene it shows, the true verdict, if it is right, SC, PQ and O on 0..10."""
    shown, marks = read_scenes(pictures)
    rows = []
    for scene, target, seen, mark in zip(scenes, targets, shown.tolist(), marks):
        clean = bool(mark.min() >= DIRTY)
        asked = principles(scene, target)
        verdict = [int(is_true(p["question"], target, seen, clean)) for p in asked]
        categories = [p["category"] for p in asked]
        sc, pq, o = marks_to_scores(categories, verdict, mark.mean().item())
        rows.append(dict(shown=seen, clean=clean, verdict=verdict, right=seen == list(target),
                         SC=sc, PQ=pq, O=o))
    return rows


# ---------------------------------------------------------------- files

def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_jsonl(path, rows):
    """Written beside and renamed, so that a killed run leaves no half file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def to_pil(picture):
    pixels = (picture.numpy().clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels.transpose(1, 2, 0))


def from_pil(image):
    """A picture as (3, SIZE, SIZE) in 0..1."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def load_pictures(path, rows, key):
    """The pictures row[key] of a JSONL file: (B, 3, SIZE, SIZE) in 0..1."""
    return torch.stack([from_pil(Image.open(Path(path).parent / row[key])) for row in rows])


def edits_of(split, n, seed=0):
    """n different (scene, instruction, target) of one split, the kinds of edit in turn."""
    rng, seen, rows = random.Random(f"{seed} {split}"), set(), []
    while len(rows) < n:
        scene = random_scene(rng)
        if split_of(scene) != split:
            continue
        instruction, target = random_edit(rng, scene, EDITS[len(rows) % 5])
        if (tuple(scene), instruction) not in seen:
            seen.add((tuple(scene), instruction))
            rows.append((scene, instruction, target))
    return rows


def write_edits(out):
    """<split>/edits.jsonl {id, source, instruction, task}, pictures; every split but pretrain."""
    for split, n in EDITS_OF.items():
        rows, folder, edits = [], Path(out) / split, edits_of(split, n)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        pictures = render([scene for scene, _, _ in edits])
        for i, (scene, instruction, _) in enumerate(edits):
            # named by its scene, so that edits of the same scene share their source file
            source = f"images/{'_'.join('x' if code < 0 else str(code) for code in scene)}.png"
            to_pil(pictures[i]).save(folder / source)
            task = apply_instruction(scene, instruction)[0]
            rows.append(dict(
                id=f"{split}_{i:04d}", source=source, instruction=instruction, task=task))
        write_jsonl(folder / "edits.jsonl", rows)
        print(f"{len(rows)} edits in {folder}/edits.jsonl")


def judge_rows(path, rows):
    """The oracle on rows {source, instruction, edit}; it reads the scene off the source."""
    scenes = read_scenes(load_pictures(path, rows, "source"))[0].tolist()
    targets = [apply_instruction(s, r["instruction"])[1] for s, r in zip(scenes, rows)]
    return oracle(load_pictures(path, rows, "edit"), scenes, targets)


def prefer(candidates, out, same=1.0, noise=0.03):
    """Candidates -> human-like pairs: better O wins, |difference| < same is dropped, some flip.

    The candidates of one edit are shuffled (by its id) and shown to the annotator two by two.
    """
    rows, groups, dropped, pairs = read_jsonl(candidates), {}, 0, []
    for row, found in zip(rows, judge_rows(candidates, rows)):
        groups.setdefault(row["id"].rsplit("/", 2)[0], []).append((row, found["O"]))
    folder = os.path.relpath(Path(candidates).parent, Path(out).parent)
    for name, group in groups.items():
        rng = random.Random(name)
        rng.shuffle(group)
        for k, ((a, score_a), (b, score_b)) in enumerate(zip(group[::2], group[1::2])):
            if abs(score_a - score_b) < same:
                dropped += 1
                continue
            chosen, rejected = (a, b) if (score_a > score_b) ^ (rng.random() < noise) else (b, a)
            paths = dict(source=a["source"], chosen=chosen["edit"], rejected=rejected["edit"])
            paths = {key: os.path.normpath(os.path.join(folder, p)) for key, p in paths.items()}
            row = {key: a[key] for key in ("instruction", "principles", "task")}
            pairs.append(dict(id=f"{name}/{k}", **row, **paths))
    write_jsonl(out, pairs)
    print(f"{len(pairs)} pairs in {out}; {dropped} were called the same and dropped")


def trust(traces):
    """Within-group correlation of every VLM's score with the oracle's O on an editor's samples.

    Both are centred within the samples of a prompt, as Flow-GRPO centres rewards, then correlated.
    -> {vlm: correlation}, printed too
    """
    rows, groups, found = read_jsonl(traces), {}, {}
    for row, truth in zip(rows, judge_rows(traces, rows)):
        prompt = row["id"].rsplit("/", 2)[0]
        for trace in row["traces"]:
            group = groups.setdefault(trace["vlm"], {}).setdefault(prompt, [])
            group.append((trace["score"], truth["O"]))
    for vlm, by_prompt in groups.items():
        samples = [torch.tensor(group, dtype=torch.float64) for group in by_prompt.values()]
        pairs = torch.cat([group - group.mean(0) for group in samples])
        found[vlm] = torch.corrcoef(pairs.T)[0, 1].item()
        print(f"{vlm}: within-group correlation with the oracle's O {found[vlm]:.3f} "
              f"({len(pairs)} edits of {len(by_prompt)} prompts)")
    return found


def judge(edits, out):
    """scores.jsonl of the oracle: {id, task, editor, SC, PQ, O, right} for every edit."""
    rows = read_jsonl(edits)
    scores = [{k: r[k] for k in ("id", "task", "editor") if k in r}
              | {k: f[k] for k in ("SC", "PQ", "O", "right")}
              for r, f in zip(rows, judge_rows(edits, rows))]
    write_jsonl(out, scores)
    mean = {k: sum(s[k] for s in scores) / len(scores) for k in ("SC", "PQ", "O", "right")}
    print(f"oracle on {len(scores)} edits: " + "  ".join(f"{k} {v:.3f}" for k, v in mean.items()))


def curve(samples, out):
    """One row per step_*/edits.jsonl of a Flow-GRPO run: mean score of reward model and oracle."""
    rows = []
    for path in sorted(Path(samples).glob("step_*/edits.jsonl")):
        edits = read_jsonl(path)
        found = judge_rows(path, edits)
        scores = [e["score"] for e in edits if e["score"] is not None]
        means = {f"oracle {k}": sum(f[k] for f in found) / len(found) for k in ("O", "SC", "PQ")}
        step = int(path.parent.name.removeprefix("step_"))
        rows.append(dict(step=step, reward=sum(scores) / max(1, len(scores)), **means))
        print(f"step {step:3d}  " + "  ".join(f"{k} {v:.2f}" for k, v in [*rows[-1].items()][1:]))
    write_jsonl(out, rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    actions = dict(edits=(write_edits, "out"), prefer=(prefer, "candidates", "out"),
                   trust=(trust, "traces"),
                   judge=(judge, "edits", "out"), curve=(curve, "samples", "out"))
    for name, (_, *flags) in actions.items():
        command = commands.add_parser(name)
        for flag in flags:
            command.add_argument(f"--{flag}", required=True)
    args = vars(parser.parse_args())
    actions[args.pop("command")][0](**args)


if __name__ == "__main__":
    main()

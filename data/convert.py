"""Turn public data sets into our rows. This is no stage, and the only file that may need pyarrow.

    python data/convert.py editscore-bench --source EditScore/EditReward-Bench --out bench
    python data/convert.py imgedit --source FOLDER --files "*remove_part5.parquet" --out edits

command            reads, as it lies on disk                        writes       needs pyarrow
editscore-bench    save_to_disk: state.json and *.arrow shards      preferences  yes
editreward-data    parquet with the bytes of the images             preferences  yes
editreward-bench   parquet with bytes, folders 2pair, 3pair, 4pair  preferences  yes
genai-bench        parquet with bytes, image_edition, test_v1       preferences  yes
aurora-ratings     *ratings_pairwise*.json [{prompt, path_src,      preferences  no
                   path1, path2, model1_dim1_score,
                   model2_dim1_score}], images in folders
aurora             test.json {input, prompt, task} and images, or   edits        for parquet
                   parquet with bytes in the same columns
gedit-bench        save_to_disk, or parquet with bytes              edits        yes
imgedit            parquet or JSON {input_images, prompt}, images   edits        for parquet
                   in folders, x.tar or x.tar.split.000, .001 ...
imgedit-bench      basic_edit.json {id: {id, prompt, edit_type}},   edits        no
                   images in folders or tars (--files UGE_edit.json: the hard ones)

--source is a folder, or a hub id, of which only the files that are needed are downloaded. (What is
JSON only is not on the hub in this form: put the JSON file and its images, or Benchmark.tar, into
one folder.) Linked folders are followed. --out is a folder for this data set alone.

    edits.jsonl        id, source, instruction, task?; GEdit: language, intersection (all compared
                       closed editors answered)
    votes.jsonl        every pair: id, source, instruction, left, right, vote and what is known of
                       task, dimension, group, candidates, models and scores ([left, right] each)
    preferences.jsonl  the pairs with a winner: chosen, rejected in place of left, right
    <name>.failed.jsonl    id if known, row (its place), error
    images/            named by their content, bytes as they were: an image of many rows is there
                       once, and rows with one source share its path

vote    left | right | tie | both bad. A judge that always says left is right where vote is left.
        EditScore always lists the winner first; there a hash of the id decides which side is left,
        so that this judge is at chance. The other data sets keep the sides that people saw.
group   K = `candidates` edits of one source and all K (K - 1) / 2 comparisons of them; a judge has
        a group right if it has all of them right. Each comparison is a row.

Preference rows have no principles: decompose.py adds them to the rows, and leaves all paths but
`source` as they are, so let it write into the same folder.

Some rows are skipped, and the reason is counted: GEdit's other language (--language); ImgEdit's
edits of several input images, and later turns, whose instructions speak of the turns before. Some
rows fail: a missing or damaged image, a damaged shard (one failure, for an unknown number of rows),
an id that is taken, text that the stages refuse. A pair that occurs again is kept and counted,
since two people may disagree. A rerun gives the same bytes. Rows are written to other files (.tmp),
which are renamed when all is done.

Traps in the data: GEdit's `key` is unique only within language and task (604 of 606 rows survive
without them), and its Chinese rows say cn, not zh. GenAI-Bench has an older test split beside
test_v1. ImgEdit's hybrid rows say results_compose where the tar says results_hybrid (--rename),
its action rows name the file without a folder, and load_dataset cannot read it.
"""
import argparse
import collections
import functools
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import unicodedata
from fnmatch import fnmatch
from pathlib import Path

from PIL import Image


# ------------------------------------------------------------------ one row of each data set
# Each function takes a row as it is published and its place. It returns our row, in which images
# are still bytes or paths, or a text that says why such rows are skipped.

def editscore_bench(row, where, args):
    """The first output is the winner; a hash of the id decides whether it is shown on the left."""
    winner, loser = row["output_images"]
    name = "/".join([row["task_type"], row["dimension"], *row["key"]])
    side = ("left", "right")[hashlib.sha256(name.encode()).digest()[0] % 2]
    left, right = (winner, loser) if side == "left" else (loser, winner)
    return dict(id=name, source=row["input_image"], instruction=row["instruction"], left=left,
                right=right, vote=side, task=row["task_type"], dimension=row["dimension"])


def editreward_data(row, where, args):
    """unique_key names the edits that were compared, pair_index the pair among them."""
    columns = dict(overall="overall", instruction_following="instruction_following",
                   visual_quality="quality_aesthetic")
    scores = {name: [row.get(f"{side}_{column}_score") for side in ("left", "right")]
              for name, column in columns.items()}
    return dict(id=f"{row['unique_key']}/{row['pair_index']}", source=row["source_img"],
                instruction=row["instruction"], left=row["left_output_image"],
                right=row["right_output_image"], vote=read_vote(row["vote_type"]),
                models=[row.get("left_model"), row.get("right_model")], scores=scores)


def editreward_bench(row, where, args):
    """One comparison of a group; its sides are two letters, as in AvsC."""
    a, _, b = (row["comparison_type"] or "AvsB").partition("vs")
    group = f"{row['dataset']}/{row['id']}".removesuffix(f"_{a}vs{b}")
    columns = dict(overall="overall_score", instruction_following="instruction_following",
                   visual_quality="visual_quality")
    scores = {name: [row.get(f"{column}_1"), row.get(f"{column}_2")]
              for name, column in columns.items()}
    return dict(id=f"{group}/{a}vs{b}", source=row["source_image"], instruction=row["instruction"],
                left=row["candidate_1"], right=row["candidate_2"],
                vote=read_ranking(row["ranking"], a, b), task=row["dataset"], group=group,
                candidates=row["num_candidates"], models=[row.get("model_1"), row.get("model_2")],
                scores=scores)


def genai_bench(row, where, args):
    return dict(id=where, source=row["source_image"], instruction=row["instruct_prompt"],
                left=row["left_output_image"], right=row["right_output_image"],
                vote=read_vote(row["vote_type"]),
                models=[row.get("left_model"), row.get("right_model")])


def aurora_ratings(row, where, args):
    """People scored both edits: equal scores are a tie."""
    left, right = row["model1_dim1_score"], row["model2_dim1_score"]
    return dict(id=where, source=row["path_src"], instruction=row["prompt"], left=row["path1"],
                right=row["path2"], scores=dict(overall=[left, right]),
                vote=compare_scores(left, right))


def compare_scores(left, right):
    if left == right:
        return "tie"
    return "left" if left > right else "right"


def aurora(row, where, args):
    return dict(id=f"{row['task']}/{where}", source=row["input"], instruction=row["prompt"],
                task=row["task"])


def gedit_bench(row, where, args):
    language, task = row["instruction_language"], row["task_type"]
    if language != args.language:
        return f"instruction in {language}"
    return dict(id=f"{language}/{task}/{row['key']}", source=row["input_image"],
                instruction=row["instruction"], task=task, language=language,
                intersection=row["Intersection_exist"])


def imgedit(row, where, args):
    """The task is the name of the parquet file: remove_part5 holds edits of the task remove."""
    if row.get("turn"):
        return "later turn"
    if len(row["input_images"]) > 1:
        return "several input images"
    [source] = row["input_images"]
    task = re.sub(r"_part\d+.*", "", where.split("/")[0])
    return dict(id=where, source=source, instruction=row["prompt"], task=task)


def imgedit_bench(row, where, args):
    """The key in the JSON file is the id of the edit, the field id is the image."""
    task = {"task": row["edit_type"]} if "edit_type" in row else {}
    return dict(id=where, source=row["id"], instruction=row["prompt"], **task)


def read_vote(text):
    """left, right, tie or both bad, from leftvote, rightvote, tie or tievote, bothbad_vote."""
    word = re.sub("vote|[^a-z]", "", str(text).lower())
    if word not in ("left", "right", "tie", "bothbad"):
        raise ValueError(f"unknown vote {text!r}")
    return word.replace("bothbad", "both bad")


def read_ranking(text, a, b):
    """The vote between letters a (left) and b (right) in C>A>B, A<B, A=B=Good or A=B=Bad."""
    text = str(text)
    levels = [level.split("=") for level in re.split("[<>]", text)]
    if "<" in text:
        levels.reverse()
    rank = {letter: i for i, level in enumerate(levels) for letter in level}
    if a not in rank or b not in rank or ("<" in text and ">" in text):
        raise ValueError(f"ranking {text!r} does not compare {a} and {b}")
    if rank[a] == rank[b]:
        return "both bad" if "Bad" in rank else "tie"
    return "left" if rank[a] < rank[b] else "right"


# ------------------------------------------------------------------ rows as they lie on disk
# Readers give (place, row), or (place, ValueError) where a row cannot be read.

def nfc(name):
    """One spelling for a name: an accented letter may be stored as one or as two characters."""
    return unicodedata.normalize("NFC", name)


def files_in(folder, parents=()):
    """Every file in a folder, also in linked folders, but not in a link to a folder above."""
    real = os.path.realpath(folder)
    if real in parents:
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from files_in(path, (*parents, real))
        elif path.is_file():
            yield path


def wanted(folder, ending, patterns):
    """The files with this ending whose path matches a pattern, sorted."""
    found = []
    for path in files_in(folder):
        name = path.absolute().as_posix()
        if name.endswith(ending) and any(fnmatch(name, f"*/{pattern}") for pattern in patterns):
            found.append(path)
    return found


def shards(folder, patterns):
    """The arrow files that state.json lists, in its order, or else all arrow or parquet files."""
    listed = []
    for state in wanted(folder, "/state.json", ["*"]):
        for item in json.loads(state.read_text("utf-8-sig"))["_data_files"]:
            listed.append(state.parent / item["filename"])
    return listed or wanted(folder, ".arrow", patterns) or wanted(folder, ".parquet", patterns)


def table_rows(folder, patterns, columns):
    """Rows of arrow shards or of parquet files."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise SystemExit("This data set consists of arrow or parquet files: pip install pyarrow")
    for path in shards(folder, patterns):
        number = 0
        try:
            if path.suffix == ".parquet":
                batches = pq.ParquetFile(path).iter_batches(batch_size=16)
            else:
                batches = pa.ipc.open_stream(pa.memory_map(str(path)))
            for batch in batches:
                missing = set(columns) - set(batch.schema.names)
                if missing:
                    raise SystemExit(f"{path} has no column {', '.join(sorted(missing))}, only "
                                     f"{', '.join(batch.schema.names)}. Is it this data set?")
                for first in range(0, len(batch), 16):     # a few images in memory at a time
                    for row in batch.slice(first, 16).to_pylist():
                        yield f"{path.stem}/{number}", row
                        number += 1
        except (pa.ArrowException, OSError) as error:
            yield f"{path.stem}/{number}", ValueError(
                f"{path} is missing or damaged here, and later rows with it ({error})")


def json_rows(folder, patterns, columns=()):
    """Rows of JSON files: a list, lines, or an object whose keys are the places."""
    for path in wanted(folder, ".json", patterns) + wanted(folder, ".jsonl", patterns):
        data = path.read_bytes()
        if path.suffix == ".jsonl" or has_json_lines(data):
            yield from json_lines(path, data)
            continue
        try:     # objects as tuples of pairs: a dict would lose the first of two equal keys
            content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=tuple)
        except ValueError as error:
            raise SystemExit(f"{path} is no whole JSON file ({error}). Download it again.")
        if isinstance(content, tuple):
            for where, row in content:
                yield where, objects(row)
        else:
            for number, row in enumerate(content):
                yield f"{path.stem}/{number}", objects(row)


def has_json_lines(data):
    """Whether a .json file really holds an object on every line."""
    first_line, _, rest = data.strip().partition(b"\n")
    try:
        return rest != b"" and isinstance(json.loads(first_line.decode("utf-8-sig")), dict)
    except ValueError:
        return False


def json_lines(path, data):
    """A row for each line; a damaged line, even one cut inside a letter, fails alone."""
    for number, line in enumerate(data.rstrip(b"\n").split(b"\n")):
        where = f"{path.stem}/{number}"
        try:
            yield where, json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            yield where, ValueError(f"no whole JSON object ({error})")


def objects(value):
    """Tuples of pairs back into dicts."""
    if isinstance(value, tuple):
        return {key: objects(item) for key, item in value}
    if isinstance(value, list):
        return [objects(item) for item in value]
    return value


def any_rows(folder, patterns, columns):
    """Parquet files if there are any, else JSON."""
    if wanted(folder, ".parquet", ["*"]):
        return table_rows(folder, patterns, columns)
    return json_rows(folder, patterns, columns)


def imgedit_rows(folder, patterns, columns):
    """Rows of ImgEdit; a row of several turns, {data: [turn, ...]}, becomes a row per turn."""
    for where, row in any_rows(folder, patterns, columns):
        if isinstance(row, dict) and row.get("data"):
            for number, turn in enumerate(row["data"]):
                yield f"{where}/{number}", turn | {"turn": number}
        else:
            yield where, row


# ------------------------------------------------------------------ images

def read_at(parts, offset, size):
    """Bytes of the file that is cut into these parts; fewer at its end."""
    data = b""
    for path in parts:
        length = os.path.getsize(path)
        if offset < length and len(data) < size:
            with open(path, "rb") as file:
                file.seek(offset)
                data += file.read(size - len(data))
        offset = max(0, offset - length)
    return data


class Joined:
    """The parts of a file, read as one file; as much of a file as tarfile needs."""

    def __init__(self, parts):
        self.parts = parts
        self.position = 0

    def read(self, size):
        data = read_at(self.parts, self.position, size)
        self.position += len(data)
        return data

    def seek(self, position):
        self.position = position

    def tell(self):
        return self.position


def tar_members(name, parts):
    """(name, offset, size) of the files in a tar that may be cut into parts; reports damage."""
    try:
        tar = tarfile.open(fileobj=Joined(parts), mode="r:")
        for member in tar:
            if member.isfile():
                yield member.name, member.offset_data, member.size
        damaged = read_at(parts, tar.offset, 512) != bytes(512)    # a whole tar ends in zeros
    except tarfile.TarError:
        damaged = True
    if damaged:
        print(f"{name} is damaged: the images in the rest of it are missing")


@functools.lru_cache
def image_index(folder):
    """{file name: [(path, parts, offset, size)]} of all in the folder, then of all in its tars."""
    index = collections.defaultdict(list)
    tars = collections.defaultdict(list)
    for path in files_in(folder):
        tar = re.fullmatch(r"(.+\.tar)(\.split\.\d+)?", str(path))
        if tar:
            tars[tar[1]].append(path)
        else:
            place = (nfc(path.as_posix()), (path,), 0, path.stat().st_size)
            index[nfc(path.name)].append(place)
    for name, parts in tars.items():
        # behind a part that is missing nothing can be read; beside a whole tar no part is needed
        parts = [part for number, part in enumerate(parts)
                 if part.suffix == ".tar" or int(part.suffix[1:]) == number]
        for member, offset, size in tar_members(name, parts):
            member = nfc(member)
            index[member.split("/")[-1]].append((nfc(f"{name}/{member}"), parts, offset, size))
    return index


def find_image(folder, path, renames):
    """Bytes of the image whose place ends in `path`, or in `path` with a rename."""
    names = [path]
    for rename in renames:
        old, new = rename.split("=")
        names.append(path.replace(old, new))
    for name in names:
        ending = nfc("/" + os.path.normpath(name).lstrip("/"))
        places = []
        for place in image_index(folder).get(ending.split("/")[-1], []):
            if f"/{place[0]}".replace("/./", "/").endswith(ending):
                places.append(place)
        if len(places) > 1 and ending.count("/") == 1:      # a bare file name says too little
            raise ValueError(f"{path} may be {places[0][0]} or {places[1][0]}")
        if places:                          # several: the same folder twice, unpacked and as a tar
            found, parts, offset, size = places[0]
            data = read_at(parts, offset, size)
            if len(data) < size:
                raise ValueError(f"{found} is damaged")
            return data
    raise ValueError(f"no image {path}")


def save_image(value, folder, args):
    """Write an image, given as bytes, {bytes, path} or path, into images/; -> its path there."""
    if isinstance(value, dict):
        value = value["bytes"] or value["path"]
    data = find_image(folder, value, args.rename) if isinstance(value, str) else value
    if not data:
        raise ValueError("no image given")
    stem = Path(args.out, "images", hashlib.sha256(data).hexdigest()[:24])
    try:
        image = Image.open(io.BytesIO(data))
        path = stem.with_suffix(f".{image.format.lower().replace('jpeg', 'jpg')}")
        if not path.exists():
            image.load()                    # a damaged image opens, but does not load
    except Exception as error:              # Pillow raises more kinds of errors than one can list
        raise ValueError(f"not a readable image ({error})")
    if image.mode.startswith(("I", "F")):   # 16 bits a channel: the stages would refuse it
        raise ValueError(f"an image with pixels of mode {image.mode}")
    if not path.exists():
        stem.with_suffix(".tmp").write_bytes(data)
        os.replace(stem.with_suffix(".tmp"), path)
    return f"images/{path.name}"


# ------------------------------------------------------------------ the commands

COMMANDS = {     # name: function of a row, reader, what it writes, columns that a table must have,
    # the files to read, how many rows were published (None: not known), license
    "editscore-bench": (editscore_bench, table_rows, "preferences",
                        "key instruction input_image output_images task_type dimension", "*",
                        None, "Apache-2.0"),
    "editreward-data": (editreward_data, table_rows, "preferences", "unique_key vote_type", "*",
                        170772, "cc-by-nc-4.0: non-commercial"),
    "editreward-bench": (editreward_bench, table_rows, "preferences", "ranking comparison_type",
                         "*", None, "Apache-2.0"),
    "genai-bench": (genai_bench, table_rows, "preferences", "instruct_prompt vote_type",
                    "image_edition/test_v1*", 919, "cc-by-4.0"),
    "aurora-ratings": (aurora_ratings, json_rows, "preferences", "", "*ratings_pairwise*.json",
                       None, "see its page"),
    "aurora": (aurora, any_rows, "edits", "input prompt task", "test*", 400, "see its page"),
    "gedit-bench": (gedit_bench, table_rows, "edits",
                    "key instruction instruction_language task_type input_image", "*", 1212, "MIT"),
    "imgedit": (imgedit, imgedit_rows, "edits", "", "*_part*", None, "Apache-2.0"),
    "imgedit-bench": (imgedit_bench, json_rows, "edits", "", "basic_edit.json", 737, "Apache-2.0")}


def local_folder(source, patterns):
    """The folder, or the snapshot of the hub id, of which only what matches is downloaded."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise SystemExit(f"{source} is no folder, and no hub id such as EditScore/EditReward-Bench")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError) as error:      # no network, no such id, a license to accept first
        raise SystemExit(f"{source} could not be downloaded: {error}")


def with_images(row, where, folder, args, seen):
    """The row with its images written into images/; ValueError if it cannot be used."""
    if row["id"] in seen:
        raise ValueError(f"its id is that of row {seen[row['id']]} already")
    if not isinstance(row["instruction"], str) or not row["instruction"].strip():
        raise ValueError("no instruction")
    if "<|" in row["instruction"]:
        raise ValueError("the instruction contains '<|', the start of a special token")
    for field in ("source", "left", "right"):
        if field in row:
            row = row | {field: save_image(row[field], folder, args)}
    json.dumps(row, ensure_ascii=False).encode()    # fails if half of a surrogate pair is in it
    seen[row["id"]] = where
    return row


def preference(row):
    """A pair with a winner: chosen and rejected in place of left and right."""
    loser = "right" if row["vote"] == "left" else "left"
    pair = {field: row[field] for field in ("id", "source", "instruction")}
    pair |= dict(chosen=row[row["vote"]], rejected=row[loser])
    for field, value in row.items():
        if field not in ("left", "right"):
            pair[field] = value
    return pair


class Output:
    """JSONL files that are written under other names, and renamed when all is done."""

    def __init__(self, folder, kinds):
        self.folder = folder
        self.counts = collections.Counter()
        self.files = {}
        for kind in kinds:                  # A failed row may hold half of a surrogate pair.
            self.files[kind] = open(folder / f"{kind}.jsonl.tmp", "w", encoding="utf-8",
                                    errors="backslashreplace")

    def write(self, kind, row):
        self.files[kind].write(json.dumps(row, ensure_ascii=False) + "\n")
        self.counts[kind] += 1

    def close(self):
        for kind, file in self.files.items():
            file.close()
            if self.counts[kind]:
                os.replace(file.name, self.folder / f"{kind}.jsonl")
            else:                           # no such rows, so no such file, nor one of a run before
                os.remove(file.name)
                Path(self.folder, f"{kind}.jsonl").unlink(missing_ok=True)


def convert(args):
    """Read every row once, write what comes of it, and report the numbers."""
    to_row, read, name, columns, files, published, license_name = COMMANDS[args.command]
    patterns = args.files or [files]
    if args.command == "imgedit" and not (args.files or Path(args.source).is_dir()):
        raise SystemExit("ImgEdit has several terabytes: name a parquet file and its tars, such as "
                         "--files Parquet/remove_part5.parquet 'Singleturn/*remove_laion_part5*'")
    folder = local_folder(args.source, patterns)
    Path(args.out, "images").mkdir(parents=True, exist_ok=True)
    failed = f"{name}.failed"
    output = Output(Path(args.out), [failed, "votes", name])
    rows = read(folder, patterns, columns.split())
    rows = itertools.islice(rows, args.limit or None)
    num_rows, skipped, pairs = write_rows(rows, to_row, name, folder, args, output)
    if num_rows == 0:
        raise SystemExit(f"{args.source}: no rows in files that match {' '.join(patterns)}. "
                         "Name the files with --files.")
    output.close()

    print(f"License: {license_name}")
    if published and num_rows != published and not (args.limit or args.files):
        print(f"expected {published} rows, as published, got {num_rows}")
    for reason, count in sorted(skipped.items()):
        print(f"skipped {count}: {reason}")
    if name == "preferences":
        print(pair_report(pairs))
    num_failed = output.counts[failed]
    num_done = num_rows - skipped.total() - num_failed
    where_failed = f" (see {args.out}/{failed}.jsonl)" if num_failed else ""
    print(f"{args.out}/{name}.jsonl: rows in {num_rows}, done {num_done}, "
          f"skipped {skipped.total()}, failed {num_failed}{where_failed}")
    if num_done == 0:
        raise SystemExit(1)


def write_rows(rows, to_row, name, folder, args, output):
    """Write each row where it belongs: (number of rows, {reason: skipped rows}, pairs)."""
    num_rows = 0
    skipped = collections.Counter()
    pairs = []
    seen = {}
    for where, raw in rows:
        num_rows += 1
        row = {}
        try:
            if isinstance(raw, ValueError):
                raise raw
            row = to_row(raw, where, args)
            if isinstance(row, str):
                skipped[row] += 1
                continue
            row = with_images(row, where, folder, args, seen)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            known = {"id": row["id"]} if "id" in row else {}
            output.write(f"{name}.failed", known | dict(row=where, error=reason))
            continue
        if name == "edits":
            output.write("edits", row)
            continue
        output.write("votes", row)
        pairs.append({k: v for k, v in row.items() if k not in ("models", "scores")})
        if row["vote"] in ("left", "right"):
            output.write("preferences", preference(row))
    return num_rows, skipped, pairs


def pair_report(pairs):
    """What a reader of pair accuracies must know: votes, repeated pairs, incomplete groups."""
    first_votes = {}
    repeated = 0
    contradicted = 0
    for row in pairs:
        pair = (row["source"], row["instruction"], row.get("dimension"),
                *sorted([row["left"], row["right"]]))
        vote = row.get(row["vote"], row["vote"])            # the image that won, or tie
        if pair in first_votes:
            repeated += 1
            contradicted += first_votes[pair] != vote
        first_votes.setdefault(pair, vote)
    votes = collections.Counter(row["vote"] for row in pairs)
    text = "votes: " + ", ".join(f"{votes[vote]} {vote}" for vote in sorted(votes))
    text += f"; {repeated} pairs occur again, {contradicted} of them with another vote"
    groups = collections.Counter(
        (row["group"], row["candidates"]) for row in pairs if "group" in row)
    if groups:
        short = sum(n != k * (k - 1) // 2 for (_, k), n in groups.items())
        text += f"; {len(groups)} groups, {short} of them lack comparisons"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--source", required=True, help="Folder, or hub id of a data set.")
    parser.add_argument("--out", required=True, help="Folder for the rows and images/.")
    parser.add_argument("--files", nargs="+", default=[], help="Read only files that match, such "
                        "as Parquet/remove_part5.parquet; only these are downloaded.")
    parser.add_argument("--limit", type=int, default=0, help="Read this many rows; 0 means all.")
    parser.add_argument("--language", choices=["en", "cn"], default="en",
                        help="Language of GEdit-Bench's instructions.")
    parser.add_argument("--rename", nargs="*", default=["results_compose=results_hybrid"],
                        metavar="OLD=NEW", help="Try this name where an image is not found.")
    convert(parser.parse_args())


if __name__ == "__main__":
    main()

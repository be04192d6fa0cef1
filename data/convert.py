"""No stage: public data into our rows, and the only file that may need `datasets` or pyarrow.

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

--source is a folder, or a hub id, of which only the files that are needed are downloaded (what is
JSON only is not on the hub in this form: put the JSON file and its images, or Benchmark.tar, into
one folder). --out is a folder for this data set alone.

    edits.jsonl        id, source, instruction, task?; GEdit: language, intersection (all compared
                       closed editors answered)
    votes.jsonl        every pair: id, source, instruction, left, right, vote and what is known of
                       task, dimension, group, candidates, models and scores ([left, right] each)
    preferences.jsonl  the pairs with a winner: chosen, rejected in place of left, right
    <name>.failed.jsonl    id if known, row (its place), error
    images/            named by their content, bytes as they were: a picture of many rows is there
                       once, and rows with one source share its path

vote    left | right | tie | both bad. An always-left judge is right where vote is left. EditScore
        lists the winner first, always; there a hash of the id decides which side is left, so that
        this judge is at chance. The other data sets keep the sides their people saw.
group   K = `candidates` edits of one source and all K (K - 1) / 2 comparisons of them; a judge has
        a group right if it has all of them right. Each comparison is a row.

Preference rows have no principles: decompose.py adds them to the rows, and leaves all paths but
`source` as they are, so let it write into the same folder.

Rows that are skipped, with the reason counted: GEdit's other language (--language); ImgEdit's
edits of several input images, and later turns, whose instructions speak of the turns before. Rows
that fail: a missing or torn picture, a torn shard (one failure, for an unknown number of rows), an
id that is taken. A pair that stands there again is kept and counted, since two people may disagree.
A rerun gives the same bytes. Rows are written beside (.tmp) and renamed when all is done.

Traps in the data: GEdit's `key` is unique only within language and task (604 of 606 rows survive
without them), and its Chinese rows say cn, not zh. GenAI-Bench has an older test split beside
test_v1. ImgEdit's hybrid rows say results_compose where the tar says results_hybrid (--rename),
its action rows name the file without a folder, and load_dataset cannot read it.
"""
import argparse, collections, functools, hashlib, io, itertools, json, os, re, tarfile
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

from PIL import Image


# ------------------------------------------------------------------ one row of each data set
# A row as it lies there and its place -> our row, in which pictures are still bytes or paths, or a
# text: why such rows are skipped.

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
                vote="tie" if left == right else "left" if left > right else "right")


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
    """The key in the JSON file is the id of the edit, the field id is the picture."""
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

def wanted(folder, ending, patterns):
    """The files with this ending whose path matches a pattern, sorted."""
    found = ((path, path.absolute().as_posix()) for path in sorted(folder.rglob(f"*{ending}")))
    return [path for path, name in found if any(fnmatch(name, f"*/{t}") for t in patterns)]


def table_rows(folder, patterns, columns):
    """Rows of arrow shards, in the order of state.json, or else of parquet files."""
    try:
        import pyarrow as pa, pyarrow.parquet as pq
    except ImportError:
        raise SystemExit("This data set lies in arrow or parquet files: pip install pyarrow")
    files = [state.parent / item["filename"] for state in sorted(folder.rglob("state.json"))
             for item in json.loads(state.read_text("utf-8"))["_data_files"]]
    files = files or wanted(folder, ".arrow", patterns) or wanted(folder, ".parquet", patterns)
    for path in files:
        number = 0
        try:
            if path.suffix == ".parquet":
                batches = pq.ParquetFile(path).iter_batches(batch_size=16)
            else:
                batches = pa.ipc.open_stream(pa.memory_map(str(path)))
            for batch in batches:
                if missing := set(columns) - set(batch.schema.names):
                    raise SystemExit(f"{path} has no column {', '.join(sorted(missing))}, only "
                                     f"{', '.join(batch.schema.names)}. Is it this data set?")
                for first in range(0, len(batch), 16):     # a few pictures in memory at a time
                    for row in batch.slice(first, 16).to_pylist():
                        yield f"{path.stem}/{number}", row
                        number += 1
        except (pa.ArrowException, OSError) as error:
            yield f"{path.stem}/{number}", ValueError(
                f"{path} is missing or torn here, and later rows with it ({error})")


def json_rows(folder, patterns, columns=()):
    """Rows of JSON files: a list, lines, or an object whose keys are the places."""
    for path in wanted(folder, ".json", patterns) + wanted(folder, ".jsonl", patterns):
        text = path.read_text("utf-8")
        if path.suffix == ".jsonl":
            for number, line in enumerate(text.rstrip("\n").split("\n")):
                try:
                    yield f"{path.stem}/{number}", json.loads(line)
                except ValueError as error:
                    yield f"{path.stem}/{number}", ValueError(f"no whole JSON object ({error})")
            continue
        try:     # objects as tuples of pairs: a dict would lose the first of two equal keys
            data = json.loads(text, object_pairs_hook=tuple)
        except ValueError as error:
            raise SystemExit(f"{path} is no whole JSON file ({error}). Download it again.")
        places = data if isinstance(data, tuple) else (
            (f"{path.stem}/{number}", row) for number, row in enumerate(data))
        yield from ((where, objects(row)) for where, row in places)


def objects(value):
    """Tuples of pairs back into dicts."""
    if isinstance(value, tuple):
        return {key: objects(item) for key, item in value}
    return [*map(objects, value)] if isinstance(value, list) else value


def any_rows(folder, patterns, columns):
    """Parquet where there is any, JSON where not."""
    read = table_rows if next(folder.rglob("*.parquet"), None) else json_rows
    return read(folder, patterns, columns)


def imgedit_rows(folder, patterns, columns):
    """Rows of ImgEdit; a row of several turns, {data: [turn, ...]}, becomes a row per turn."""
    for where, row in any_rows(folder, patterns, columns):
        if isinstance(row, dict) and row.get("data"):
            yield from ((f"{where}/{n}", turn | {"turn": n}) for n, turn in enumerate(row["data"]))
        else:
            yield where, row


# ------------------------------------------------------------------ pictures

def read_at(parts, offset, size):
    """Bytes of the file that is cut into these parts, less at its end."""
    data = b""
    for path in parts:
        length = os.path.getsize(path)
        if offset < length and len(data) < size:
            with open(path, "rb") as file:
                file.seek(offset)
                data += file.read(size - len(data))
        offset = max(0, offset - length)
    return data


def tar_members(name, parts):
    """(name, offset, size) of the files in a tar that may be cut into parts; says if it is torn."""
    at = [0]                                # where the parts, joined, are read

    def read(size):
        data = read_at(parts, at[0], size)
        at[0] += len(data)
        return data

    joined = SimpleNamespace(read=read, seek=lambda to: at.__setitem__(0, to), tell=lambda: at[0])
    try:
        tar = tarfile.open(fileobj=joined, mode="r:")
        for member in tar:
            if member.isfile():
                yield member.name, member.offset_data, member.size
        torn = read_at(parts, tar.offset, 512) != bytes(512)    # a whole tar ends in zeros
    except tarfile.TarError:
        torn = True
    if torn:
        print(f"{name} is torn: pictures in the rest of it are missing")


@functools.lru_cache
def picture_index(folder):
    """{file name: [(path, parts, offset, size)]} of all in the folder, then of all in its tars."""
    index, tars = collections.defaultdict(list), collections.defaultdict(list)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if tar := re.fullmatch(r"(.+\.tar)(\.split\.\d+)?", str(path)):
            tars[tar[1]].append(path)
        else:
            index[path.name].append((path.as_posix(), (path,), 0, path.stat().st_size))
    for name, parts in tars.items():
        # behind a part that is missing nothing can be read; beside a whole tar no part is needed
        parts = [p for number, p in enumerate(parts)
                 if p.suffix == ".tar" or int(p.suffix[1:]) == number]
        for member, offset, size in tar_members(name, parts):
            index[member.split("/")[-1]].append((f"{name}/{member}", parts, offset, size))
    return index


def find_picture(folder, path, renames):
    """Bytes of the picture whose place ends in `path`, or in `path` with a rename."""
    for wish in [path, *(path.replace(*rename.split("=")) for rename in renames)]:
        wish = "/" + os.path.normpath(wish).lstrip("/")
        places = [place for place in picture_index(folder).get(wish.split("/")[-1], ())
                  if f"/{place[0]}".replace("/./", "/").endswith(wish)]
        if len(places) > 1 and wish.count("/") == 1:     # a bare file name says too little
            raise ValueError(f"{path} may be {places[0][0]} or {places[1][0]}")
        if places:                          # several: the same folder twice, unpacked and as a tar
            name, parts, offset, size = places[0]
            data = read_at(parts, offset, size)
            if len(data) < size:
                raise ValueError(f"{name} is torn")
            return data
    raise ValueError(f"no picture {path}")


def save_picture(value, args):
    """Write a picture, given as bytes, {bytes, path} or path, into images/; -> its path there."""
    if isinstance(value, dict):
        value = value["bytes"] or value["path"]
    data = find_picture(args.folder, value, args.rename) if isinstance(value, str) else value
    if not data:
        raise ValueError("no picture given")
    stem = Path(args.out, "images", hashlib.sha256(data).hexdigest()[:24])
    try:
        image = Image.open(io.BytesIO(data))
        path = stem.with_suffix(f".{image.format.lower().replace('jpeg', 'jpg')}")
        if not path.exists():
            image.load()                    # a torn picture opens, but does not load
    except Exception as error:              # Pillow has many words for a file that is damaged
        raise ValueError(f"not a readable picture ({error})")
    if image.mode[0] in "IF":               # 16 bits a channel: the stages would refuse it
        raise ValueError(f"a picture with pixels of mode {image.mode}")
    if not path.exists():
        stem.with_suffix(".tmp").write_bytes(data)
        os.replace(stem.with_suffix(".tmp"), path)
    return f"images/{path.name}"


# ------------------------------------------------------------------ the commands

COMMANDS = {     # name: function of a row, reader, what it writes, columns that a table must have,
    # the files to read, how many rows were published (None: not known), licence
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
    except (OSError, ValueError) as error:      # no network, no such id, a licence to accept first
        raise SystemExit(f"{source} could not be downloaded: {error}")


def with_pictures(row, where, args, seen):
    """The row with its pictures written into images/; ValueError if it cannot be used."""
    if row["id"] in seen:
        raise ValueError(f"its id is that of row {seen[row['id']]} already")
    if not isinstance(row["instruction"], str) or not row["instruction"].strip():
        raise ValueError("no instruction")
    row = row | {k: save_picture(row[k], args) for k in ("source", "left", "right") if k in row}
    seen[row["id"]] = where
    return row


def preference(row):
    """A pair with a winner: chosen and rejected in place of left and right."""
    loser = "right" if row["vote"] == "left" else "left"
    first = {k: row[k] for k in ("id", "source", "instruction")}
    first |= dict(chosen=row[row["vote"]], rejected=row[loser])
    return first | {k: v for k, v in row.items() if k not in ("left", "right")}


def convert(args):
    """Read every row once, write what comes of it, and say so."""
    shape, read, name, columns, files, published, licence = COMMANDS[args.command]
    patterns = args.files or [files]
    if args.command == "imgedit" and not (args.files or Path(args.source).is_dir()):
        raise SystemExit("ImgEdit has several terabytes: name a parquet file and its tars, such as "
                         "--files Parquet/remove_part5.parquet 'Singleturn/*remove_laion_part5*'")
    args.folder, out, bad = local_folder(args.source, patterns), Path(args.out), f"{name}.failed"
    Path(out, "images").mkdir(parents=True, exist_ok=True)
    handles = {k: open(out / f"{k}.jsonl.tmp", "w", encoding="utf-8") for k in (bad, "votes", name)}
    counts, skipped, seen, pairs = collections.Counter(), collections.Counter(), {}, []

    def write(kind, row):
        handles[kind].write(json.dumps(row, ensure_ascii=False) + "\n")
        counts[kind] += 1

    rows = read(args.folder, patterns, columns.split())
    for where, raw in itertools.islice(rows, args.limit or None):
        counts["in"] += 1
        row = {}
        try:
            if isinstance(raw, ValueError):
                raise raw
            row = shape(raw, where, args)
            if isinstance(row, str):
                skipped[row] += 1
                continue
            row = with_pictures(row, where, args, seen)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            write(bad, {k: row[k] for k in row if k == "id"} | dict(row=where, error=what))
            continue
        if name == "edits":
            write("edits", row)
            continue
        write("votes", row)
        pairs.append({k: v for k, v in row.items() if k not in ("models", "scores")})
        if row["vote"] in ("left", "right"):
            write("preferences", preference(row))
    if not counts["in"]:
        raise SystemExit(f"{args.source}: no rows in files that match {' '.join(patterns)}. "
                         "Name the files with --files.")
    for kind, handle in handles.items():
        handle.close()
        if counts[kind]:
            os.replace(handle.name, out / f"{kind}.jsonl")
        else:                               # no such rows, so no such file, nor one of a run before
            os.remove(handle.name)
            Path(out, f"{kind}.jsonl").unlink(missing_ok=True)

    print(f"Licence: {licence}")
    if published and counts["in"] != published and not (args.limit or args.files):
        print(f"expected {published} rows, as published, got {counts['in']}")
    print("".join(f"skipped {n}: {reason}\n" for reason, n in sorted(skipped.items())), end="")
    if name == "preferences":
        print(pair_report(pairs))
    print(f"{out / name}.jsonl: rows in {counts['in']}, done {len(seen)}, skipped "
          f"{skipped.total()}, failed {counts[bad]}"
          + (f" (see {out / bad}.jsonl)" if counts[bad] else ""))
    if not seen:
        raise SystemExit(1)


def pair_report(pairs):
    """What a reader of pair accuracies must know: votes, repeated pairs, groups that lack some."""
    best, again, other = {}, 0, 0
    for row in pairs:
        pair = (row["source"], row["instruction"], row.get("dimension"),
                *sorted([row["left"], row["right"]]))
        vote = row.get(row["vote"], row["vote"])            # the picture that won, or tie
        again, other = again + (pair in best), other + (best.setdefault(pair, vote) != vote)
    votes = collections.Counter(row["vote"] for row in pairs)
    groups = collections.Counter((row["group"], row["candidates"]) for row in pairs
                                 if "group" in row)
    short = sum(n != k * (k - 1) // 2 for (_, k), n in groups.items())
    return ("votes: " + ", ".join(f"{votes[v]} {v}" for v in sorted(votes))
            + f"; {again} pairs stand there again, {other} of them with another vote"
            + (f"; {len(groups)} groups, {short} of them lack comparisons" if groups else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--source", required=True, help="folder, or hub id of a data set")
    parser.add_argument("--out", required=True, help="folder for the rows and images/")
    parser.add_argument("--files", nargs="+", default=[], help="only files that match, such as "
                        "Parquet/remove_part5.parquet; from the hub, only these are downloaded")
    parser.add_argument("--limit", type=int, default=0, help="read this many rows; 0 = all")
    parser.add_argument("--language", choices=["en", "cn"], default="en", help="GEdit-Bench [en]")
    parser.add_argument("--rename", nargs="*", default=["results_compose=results_hybrid"],
                        metavar="OLD=NEW", help="where a picture is not found [%(default)s]")
    convert(parser.parse_args())


if __name__ == "__main__":
    main()

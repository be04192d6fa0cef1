"""Random tiny VLMs, a few rows of the toy world, and ways to run a script, for all tests."""
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"          # the models are tiny: a second thread only waits

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil,
                          Qwen3VLConfig, Qwen3VLForConditionalGeneration)

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "toy"), str(ROOT / "data"), str(ROOT / "related")]
torch.set_num_threads(1)
# A fork loses torch's pool of threads. The first threads of the new process remake it, and fail if
# two of them do so at once ("Invalid thread pool!"); so it is remade before there are threads.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]


def byte_tokenizer(phrases):
    """Bytes, Qwen's special tokens, and one more token for each phrase."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    core.add_tokens([AddedToken(s, special=False, normalized=False) for s in phrases])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        model_max_length=32768)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_vlm(folder, hidden=64, layers=2, seed=0, phrases=(), qwen3=False):
    """Folder of a random Qwen2.5-VL or Qwen3-VL; a toy picture is 4 tokens, each phrase one."""
    tokenizer = byte_tokenizer(phrases)
    ids = tokenizer.convert_tokens_to_ids
    shape = dict(hidden_size=hidden, intermediate_size=3 * hidden, initializer_range=hidden ** -0.5)
    side = hidden // 8 * 3 // 8
    patch = 16 if qwen3 else 8
    rope = dict(rope_type="default", rope_theta=1e4,
                mrope_section=[hidden // 8 - 2 * side, side, side])
    text = dict(
        **shape, vocab_size=len(tokenizer), num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=hidden // 4, max_position_embeddings=32768,
        rope_parameters=rope, tie_word_embeddings=True, bos_token_id=ids("<|endoftext|>"), eos_token_id=ids("<|im_end|>"),
        pad_token_id=ids("<|endoftext|>"))
    vision = dict(**shape, depth=2, num_heads=4, patch_size=patch, spatial_merge_size=2,
                  temporal_patch_size=2, out_hidden_size=hidden)
    vision |= (dict(num_position_embeddings=16, deepstack_visual_indexes=[0]) if qwen3 else
               dict(fullatt_block_indexes=[0, 1], window_size=64))
    torch.manual_seed(seed)
    config_class = Qwen3VLConfig if qwen3 else Qwen2_5_VLConfig
    model_class = Qwen3VLForConditionalGeneration if qwen3 else Qwen2_5_VLForConditionalGeneration
    model = model_class(config_class(
        text_config=text, vision_config=vision, image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"), vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"), tie_word_embeddings=True))
    pixels = (4 * patch) ** 2                  # Qwen3-VL's processor makes toy pictures 64x64
    images = Qwen2VLImageProcessorPil(patch_size=patch, temporal_patch_size=2, merge_size=2,
                                      size=dict(shortest_edge=pixels, longest_edge=pixels))
    for part in (model, tokenizer, images):
        part.save_pretrained(folder)
    return str(folder)


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# A process begins at once if it is forked from one that has already imported the libraries.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "conftest", "diffusers.pipelines.flux.pipeline_flux_kontext", "evaluate", "decompose", "build_sft",
    "train_sft", "train_gcpo", "train_flow_grpo", "train_nft", "train_editreward", "curate"])


def join_ranks(rank, world_size, port):
    """In a process of its own: the environment that torchrun gives to a rank."""
    if world_size > 1:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_as_main(name, flags, log, rank, world_size, port):
    """In a process of its own: what `python name flags` does, as one rank; it prints to the file `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    join_ranks(rank, world_size, port)
    sys.argv = [str(ROOT / name), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_script(name, *flags, ranks=1, check=True, timeout=600):
    """What `python name flags` does, or so many ranks of it; returns the exit code and the output as text."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        log.touch()
        processes = [FORKS.Process(target=run_as_main, args=(
            name, [str(flag) for flag in flags], log, rank, ranks, port)) for rank in range(ranks)]
        for process in processes:
            process.start()
        late = time.time() + timeout
        while any(process.is_alive() for process in processes):
            multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], 1)
            if time.time() > late or any(process.exitcode for process in processes):
                for process in processes:           # as torchrun ends the ranks that wait for a dead one
                    process.terminate()
        text = log.read_text(encoding="utf-8", errors="replace")
    code = max(processes, key=lambda process: abs(process.exitcode)).exitcode
    assert not check or code == 0, text[max(0, len(text) - 4000):]
    return SimpleNamespace(returncode=code, stdout=text)


def run_command(name, *flags, ranks=1, timeout=600):
    """`python name flags`, or torchrun, as one types it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(ROOT / name), *map(str, flags)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=timeout)


def say_verdict(verdict, score):
    """A readable verdict on as many questions as `verdict` has entries."""
    items = json.dumps([{"question": "q", "score": v} for v in verdict])
    average = sum(verdict) / len(verdict)
    return f'Seen.\n{items}\n{{"average_score": {average:.2f}}}\n<score>{score}</score>'


def phrases():
    """Every fixed line of the verdict's prompt, and 16 whole verdicts on two questions.

    A verdict is thus one token among 291: a random model writes readable ones by chance,
    reinforcement can act on them, and verdicts have very different lengths.
    """
    rules = importlib.import_module("train_gcpo").VERDICT_RULES
    words = ["Source image: ", "\nEdited image: ", "\nInstruction: ", "\nQuestions:\n",
             "- (follow) ", "- (keep) ", "- (quality) ", "Are all other places empty?",
             "Is the picture clean?", "change the ", "background"]
    verdicts = [say_verdict([i % 2, i // 2 % 2], i % 16 * 0.625) for i in range(16)]
    return [rules] + words + verdicts


@pytest.fixture(scope="session")
def vlm(tmp_path_factory):
    """Folder of a random Qwen2.5-VL with `phrases` as tokens."""
    return build_vlm(tmp_path_factory.mktemp("models") / "vlm", phrases=phrases())


@pytest.fixture(scope="session")
def vlm3(tmp_path_factory):
    """The same as a Qwen3-VL."""
    return build_vlm(tmp_path_factory.mktemp("models") / "vlm3", phrases=phrases(), qwen3=True)


@pytest.fixture(scope="session")
def toy_rows(tmp_path_factory):
    """(folder, rows): 24 toy edits with source, a right and a wrong edit, and two principles each."""
    import random
    import world
    folder = tmp_path_factory.mktemp("rows")
    rng = random.Random(0)
    rows = []
    for i in range(24):
        scene = world.random_scene(rng)
        instruction, target = world.random_edit(rng, scene)
        wrong = [(target[0] + 1) % 4, *scene[1:]]
        for name, shown in (("source", scene), ("right", target), ("wrong", wrong)):
            world.to_pil(world.render([shown])[0]).save(folder / f"{i}_{name}.png")
        rows.append(dict(id=f"row{i}", source=f"{i}_source.png", right=f"{i}_right.png",
                         wrong=f"{i}_wrong.png", instruction=instruction,
                         principles=world.principles(scene, target)[-2:]))
    return folder, rows


@pytest.fixture(scope="session")
def pairs(toy_rows):
    """preferences.jsonl of the toy rows."""
    folder, rows = toy_rows
    keys = ("id", "source", "instruction", "principles")
    return write_rows(folder / "preferences.jsonl", [
        {k: r[k] for k in keys} | dict(chosen=r["right"], rejected=r["wrong"]) for r in rows])


@pytest.fixture(scope="session")
def sft(toy_rows):
    """sft.jsonl of the toy rows: the right edit and the wrong one, each with a teacher's verdict of some tokens."""
    folder, rows = toy_rows
    sft_rows = []
    for i, row in enumerate(rows):
        for name, gold, score in (("right", [1, 1], 9.375), ("wrong", [0, 1], 1.25)):
            sft_row = {k: row[k] for k in ("source", "instruction", "principles")}
            look = ("", "I look. ", "I see it. ")[i % 3]
            sft_rows.append(sft_row | dict(id=f"{row['id']}/{name}/0", edit=row[name], gold=gold,
                                           text=look + say_verdict(gold, score)))
    return write_rows(folder / "sft.jsonl", sft_rows)


@pytest.fixture(scope="session")
def editor_folder(tmp_path_factory):
    """Folder of an untrained, smaller toy editor: a 32x32 image is 2x2 tokens."""
    import pretrain_editor
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "editor"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(WIDTH=32, HEADS=1, SINGLE_BLOCKS=1, TEXT_WIDTH=32, VAE_CHANNELS=8).items():
            patch.setattr(pretrain_editor, name, value)
        vae = pretrain_editor.build_vae()
        vae.register_to_config(shift_factor=0.1, scaling_factor=1.5)          # FLUX's differ from 0 and 1, too
        pretrain_editor.build_pipeline(vae).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def prompts_file(toy_rows):
    """principles.jsonl of the toy rows."""
    folder, rows = toy_rows
    keys = ("id", "source", "instruction", "principles")
    return write_rows(folder / "principles.jsonl", [{k: r[k] for k in keys} for r in rows])


def pytest_collection_modifyitems(items):
    """test_learns.py comes last: what it waits for has begun with the first test."""
    items.sort(key=lambda item: item.path.name == "test_learns.py")


@pytest.fixture(scope="session", autouse=True)
def learned(request, tmp_path_factory):
    """Function that waits for the folder that test_learns.py reads; it is made while the other tests run."""
    modules = [item.module for item in request.session.items if item.path.name == "test_learns.py"]
    if not modules:
        yield None
        return
    out = tmp_path_factory.mktemp("learned")
    process = FORKS.Process(target=modules[0].learn, args=(out,))
    process.start()

    def wait():
        process.join()
        assert process.exitcode == 0, "\n".join(
            f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in out.glob("*.log"))
        return out

    yield wait
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run a script's main() in this process with these flags; returns what it printed."""
    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return run


def weight_difference(folder_a, folder_b):
    """Largest absolute difference between two saved models with the same tensors."""
    from safetensors.torch import load_file
    a = load_file(Path(folder_a, "model", "model.safetensors"))
    b = load_file(Path(folder_b, "model", "model.safetensors"))
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)

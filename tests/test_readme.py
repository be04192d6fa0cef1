"""What the READMEs, the shell scripts and the docstrings say is true: functions, flags and files exist."""
import ast
import contextlib
import functools
import importlib.util
import io
import re
import sys
from unittest import mock

import pytest

from conftest import ROOT

SCRIPTS = {str(path.relative_to(ROOT)): path.read_text("utf-8")
           for folder in (".", "toy", "data", "related", "tests")
           for path in sorted((ROOT / folder).glob("*.py"))}
PAGES = {name: (ROOT / name).read_text("utf-8")
         for name in ("README.md", "toy/README.md", "data/README.md", "related/README.md",
                      "toy/run.sh", "toy/table3.sh", "toy/pretrain.sh")}
READMES = [name for name in PAGES if name.endswith(".md")]
COMMAND = re.compile(r"(?:python|torchrun)\s[^#`|]*?"
                     r"((?:(?:toy|data|related|tests)/)?\w+\.py)([^#`|]*)")


@functools.cache
def known_flags(script, command):
    """The flags that `python script command --help` prints."""
    if "ArgumentParser" not in SCRIPTS[script]:
        return set()
    spec = importlib.util.spec_from_file_location("script_of_readme", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module                     # dataclasses look their own module up
    output = io.StringIO()
    arguments = [script, command, "--help"] if command else [script, "--help"]
    with mock.patch.object(sys, "argv", arguments), contextlib.redirect_stdout(output):
        with pytest.raises(SystemExit):
            spec.loader.exec_module(module)
            module.main()
    return set(re.findall(r"(?<![\w-])--(\w[\w-]*)", output.getvalue()))


def commands(text):
    """(script, command, [flags]) of every `python x.py ...`, `torchrun ... x.py ...` in a text."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for script, rest in COMMAND.findall(line):
            words = rest.split()
            command = words[0] if words and words[0].isidentifier() else ""
            yield script, command, re.findall(r"(?<!\S)--([\w-]+)", rest)


def written_commands():
    for place, text in SCRIPTS.items():
        docstring = ast.get_docstring(ast.parse(text)) or ""
        for script, command, flags in commands(docstring):
            yield place, script, command, flags
    for place, text in PAGES.items():
        for script, command, flags in commands(text):
            yield place, script, command, flags


@pytest.mark.parametrize("place, script, command, flags", list(written_commands()), ids=lambda x: str(x)[:60])
def test_commands_are_true(place, script, command, flags):
    """Every script and every --flag of a command written down anywhere exists."""
    assert script in SCRIPTS, f"{place} runs {script}, which does not exist"
    if flags:
        unknown = set(flags) - known_flags(script, command)
        assert not unknown, f"{place}: {script} {command} has no --{', --'.join(sorted(unknown))}"


@pytest.mark.parametrize("page", READMES)
def test_functions_exist(page):
    """Every `file.py:function` of a README resolves."""
    for script, name in re.findall(r"`((?:\w+/)?\w+\.py):(\w+)(?:\(.*?\))?`", PAGES[page]):
        assert script in SCRIPTS, f"{page} names {script}, which does not exist"
        names = {getattr(node, "name", "") for node in ast.parse(SCRIPTS[script]).body}
        assert name in names, f"{page} names {script}:{name}, which does not exist"


@pytest.mark.parametrize("page", READMES)
def test_files_exist(page):
    """Every script, shell file, page and linked image that a README names exists."""
    named = set(re.findall(r"(?<![\w/.-])((?:[\w.-]+/)*[\w-]+\.(?:py|sh|md|txt|cff))\b", PAGES[page]))
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not re.match(r"https?:|#|mailto:", link):
            named.add(link.split("#")[0])
    made_by_commands = re.compile(r"(runs|real|out|DIR)/")
    for name in named:
        if not made_by_commands.match(name):
            here = (ROOT / page).parent / name
            assert here.exists() or (ROOT / name).exists(), f"{page} names {name}, which does not exist"


@pytest.mark.parametrize("page", READMES)
def test_pages_are_narrow(page):
    """Width <= 100, except for tables, links and commands."""
    for line in PAGES[page].splitlines():
        free = line.startswith(("|", "!", "python", "    ")) or "](" in line
        assert len(line) <= 100 or free, line


def test_the_flag_check_finds_mistakes():
    """The checks above see through a command as people write it."""
    text = ("`torchrun --nproc-per-node=2 evaluate.py reward --pairs a --no-such b` # --comment\n"
            "python decompose.py \\\n  --vlm x | tee y")
    assert list(commands(text)) == [("evaluate.py", "reward", ["pairs", "no-such"]),
                                    ("decompose.py", "", ["vlm"])]
    reward = known_flags("evaluate.py", "reward")
    judge = known_flags("evaluate.py", "judge")
    assert {"pairs", "out"} <= reward and "no-such" not in reward and "pairs" not in judge
    assert {"eval_every", "kl"} - known_flags("train_gcpo.py", "") == {"kl"}

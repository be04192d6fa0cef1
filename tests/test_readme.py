"""What the README, toy/run.sh and the docstrings say is true: functions, flags and files exist."""
import ast
import re

import pytest

from conftest import ROOT

SCRIPTS = {str(path.relative_to(ROOT)): path.read_text("utf-8")
           for folder in (".", "toy", "data", "related", "tests")
           for path in sorted((ROOT / folder).glob("*.py"))}
README = (ROOT / "README.md").read_text("utf-8")
COMMAND = re.compile(r"(?:python|torchrun)\s[^#`|]*?"
                     r"((?:(?:toy|data|related|tests)/)?\w+\.py)([^#`|]*)")


def known_flags(script, command):
    """Flags that a script adds to its parsers; with commands: to that of this name and `shared`."""
    tree, found = ast.parse(SCRIPTS[script]), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            if not isinstance(node.args[0], ast.Constant):     # made in a loop: any string may be
                return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
            flags = found.setdefault(node.func.value.id, {"help"})
            flags.add(node.args[0].value.removeprefix("--"))
    parsers = {"shared", command} if command in found else {*found}
    return set().union(*(found[name] for name in parsers & {*found}))


def commands(text):
    """(script, command, [flags]) of every `python x.py ...`, `torchrun ... x.py ...` in a text."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for script, rest in COMMAND.findall(line):
            word = (rest.split() or [""])[0]
            flags = re.findall(r"(?<!\S)--([\w-]+)", rest)
            yield script, word if word.isidentifier() else "", flags


SHELL = {f"toy/{name}.sh": (ROOT / f"toy/{name}.sh").read_text("utf-8") for name in ("run", "table3")}
TEXTS = SCRIPTS | {"README.md": README} | SHELL
COMMANDS = [(place, *found) for place, text in TEXTS.items() for found in commands(
    (ast.get_docstring(ast.parse(text)) or "") if place.endswith(".py") else text)]


@pytest.mark.parametrize("place, script, command, flags", COMMANDS, ids=lambda x: str(x)[:60])
def test_commands_are_true(place, script, command, flags):
    """Every script and every --flag of a command written down anywhere exists."""
    assert script in SCRIPTS, f"{place} runs {script}, which does not exist"
    unknown = {*flags} - known_flags(script, command)
    assert not unknown, f"{place}: {script} {command} has no --{', --'.join(sorted(unknown))}"


def test_readme_functions():
    """Every `file.py:function` of the README resolves."""
    for script, name in re.findall(r"`((?:\w+/)?\w+\.py):(\w+)(?:\(.*?\))?`", README):
        assert script in SCRIPTS, f"README names {script}, which does not exist"
        body = ast.parse(SCRIPTS[script]).body
        known = {getattr(node, "name", "") for node in body}
        known |= {getattr(node.targets[0], "id", "") for node in body
                  if isinstance(node, ast.Assign)}
        assert name in known, f"README names {script}:{name}, which does not exist"


def test_readme_files():
    """Every script, shell file, page and linked picture that the README names exists."""
    named = {*re.findall(r"(?<![\w/.-])((?:[\w.-]+/)*[\w-]+\.(?:py|sh|md|txt|cff))\b", README)}
    links = sum(re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", README), ())
    named |= {link.split("#")[0] for link in links if not re.match(r"https?:|#|mailto:|$", link)}
    made = re.compile(r"^(runs|real|out|DIR)/")                         # what the commands write
    missing = [name for name in named if not made.match(name) and not (ROOT / name).exists()]
    assert not missing, f"README names {', '.join(sorted(missing))}, which do not exist"


def test_flag_check_finds_mistakes():
    """The checks above see through a command as people write it."""
    text = ("`torchrun --nproc-per-node=2 evaluate.py reward --pairs a --no-such b` # --comment\n"
            "python decompose.py \\\n  --vlm x | tee y")
    assert [*commands(text)] == [("evaluate.py", "reward", ["pairs", "no-such"]),
                                 ("decompose.py", "", ["vlm"])]
    reward, edit = (known_flags("evaluate.py", name) for name in ("reward", "edit"))
    assert {"pairs", "out"} <= reward and "no-such" not in reward and "pairs" not in edit
    assert {"every", "kl"} - known_flags("train_gcpo.py", "") == {"kl"}

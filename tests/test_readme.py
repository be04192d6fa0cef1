"""What the README, toy/run.sh and the docstrings say is true: functions, flags and files exist."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
           for folder in (".", "toy", "data", "related", "tests") for path in sorted((ROOT / folder).glob("*.py"))}
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""


def top_level(text):
    """Names that a script defines at its top level."""
    tree = ast.parse(text)
    return ({node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            | {node.targets[0].id for node in tree.body if isinstance(node, ast.Assign) and hasattr(node.targets[0], "id")})


def known_flags(script, command):
    """Flags of a stage: the fields of its Config (of CommandConfig, if it has commands). Else: any string in it."""
    tree = ast.parse(SCRIPTS[script])
    fields = {node.name: {line.target.id for line in node.body if isinstance(line, ast.AnnAssign)}
              for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")}
    flags = fields.get(f"{command.capitalize()}Config", fields.get("Config"))
    if flags is None:
        return {node.value.removeprefix("--") for node in ast.walk(tree)
                if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return flags | {"no-" + flag for flag in flags} | {"toy", "help"}


def commands(text):
    """(script, command, [flags]) of every `python x.py ...` or `torchrun ... x.py ...` in a text."""
    text = re.sub(r"\\\n", " ", text)
    for line in text.splitlines():
        for match in re.finditer(r"(?:python|torchrun)\s[^#`|]*?((?:toy/|data/|related/|tests/)?\w+\.py)([^#`|]*)", line):
            words = match[2].split()
            command = words[0] if words and words[0].isidentifier() else ""
            yield match[1], command, re.findall(r"(?<!\S)--([\w-]+)", match[2])


TEXTS = dict(SCRIPTS, **{"README.md": README}, **{
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("toy/*.sh"))})
COMMANDS = [(place, *found) for place, text in TEXTS.items() for found in commands(
    (ast.get_docstring(ast.parse(text)) or "") if place.endswith(".py") else text)]


@pytest.mark.parametrize("place, script, command, flags", COMMANDS, ids=lambda value: str(value)[:60])
def test_commands_are_true(place, script, command, flags):
    """Every script and every --flag of a command written down anywhere exists."""
    assert script in SCRIPTS, f"{place} runs {script}, which does not exist"
    unknown = set(flags) - known_flags(script, command)
    assert not unknown, f"{place}: {script} {command} has no --{', --'.join(sorted(unknown))}"


def test_readme_is_there():
    assert README, "README.md is missing"


def test_readme_functions():
    """Every `file.py:function` of the README resolves."""
    for script, name in re.findall(r"`((?:\w+/)?\w+\.py):(\w+)(?:\(.*?\))?`", README):
        assert script in SCRIPTS, f"README names {script}, which does not exist"
        assert name in top_level(SCRIPTS[script]), f"README names {script}:{name}, which does not exist"


def test_readme_files():
    """Every script, shell file, page and linked picture that the README names exists."""
    named = set(re.findall(r"(?<![\w/.-])((?:[\w.-]+/)*[\w-]+\.(?:py|sh|md|txt|cff))\b", README))
    linked = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", README) for link in link
              if link and not re.match(r"https?:|#|mailto:", link)}
    made = re.compile(r"^(runs|out|DIR)/")                                # what the commands write
    missing = sorted(name for name in named | linked if not made.match(name) and not (ROOT / name).exists())
    assert not missing, f"README names {', '.join(missing)}, which do not exist"


def test_flag_check_finds_mistakes():
    """The checks above see through a command as people write it."""
    text = "`torchrun --nproc-per-node=2 evaluate.py reward --pairs a --no-such b` # --comment\npython decompose.py \\\n  --vlm x | tee y"
    assert list(commands(text)) == [("evaluate.py", "reward", ["pairs", "no-such"]), ("decompose.py", "", ["vlm"])]
    assert "no-such" not in known_flags("evaluate.py", "reward") and "pairs" in known_flags("evaluate.py", "reward")
    assert "pairs" not in known_flags("evaluate.py", "edit")

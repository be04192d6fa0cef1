"""A helper that stands in several scripts is the same text, and no copy misses an import or a neighbour."""
import ast
import builtins
import symtable
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / name for name in (".", "toy", "data", "related")]
SCRIPTS = sorted(path for folder in FOLDERS for path in folder.glob("*.py"))
# These are meant to differ from script to script: flags, and the phases of a training step.
OWN = {"main", "parse_args", "TOY", "evaluate"}
TEXTS = {path: path.read_text(encoding="utf-8") for path in SCRIPTS}
TREES = {path: ast.parse(text) for path, text in TEXTS.items()}


def name_of(script):
    return str(script.relative_to(ROOT))


def definitions():
    """name -> {source text: [scripts]} over all top-level functions, classes and CONSTANTS."""
    found = defaultdict(lambda: defaultdict(list))
    for path, tree in TREES.items():
        lines = TEXTS[path].splitlines()
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                name, first = node.name, min([node.lineno] + [d.lineno for d in node.decorator_list])
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").isupper():
                name, first = node.targets[0].id, node.lineno
            else:
                continue
            if name not in OWN:
                found[name]["\n".join(lines[first - 1:node.end_lineno])].append(name_of(path))
    return found


DEFINITIONS = definitions()


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_copies_are_identical(name):
    """One name means one thing in all scripts; a function that must differ gets another name."""
    versions = DEFINITIONS[name]
    places = " and ".join("/".join(files) for files in versions.values())
    assert len(versions) == 1, f"{name} differs between {places}"


def names_used(table):
    """Global names that a scope and the scopes in it read."""
    used = {s.get_name() for s in table.get_symbols()
            if s.is_referenced() and (s.is_global() or table.get_type() == "module")}
    return used.union(*map(names_used, table.get_children()))


def imports(tree):
    """Names that the imports of a script bind, and modules it takes them from."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    bound = {(alias.asname or alias.name).split(".")[0] for node in nodes for alias in node.names}
    return bound, {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_every_name_is_there(script):
    """A helper copied without its import fails only when it is called: find it before."""
    table = symtable.symtable(TEXTS[script], script.name, "exec")
    bound = {s.get_name() for s in table.get_symbols()
             if s.is_assigned() or s.is_imported() or s.is_namespace()}
    missing = names_used(table) - bound - set(dir(builtins)) - {"__file__", "__name__", "__doc__"}
    assert not missing, f"{name_of(script)} neither defines nor imports {', '.join(sorted(missing))}"


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_nothing_is_there_in_vain(script):
    """No import and no copied helper that the script does not use."""
    tree = TREES[script]
    used = {node.id for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    copied = {name for name, versions in DEFINITIONS.items()
              if any(len(files) > 1 for files in versions.values())}
    here = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    unused = (imports(tree)[0] | (copied & here)) - used
    assert not unused, f"{name_of(script)} does not use {', '.join(sorted(unused))}"


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_stages_stand_alone(script):
    """A stage imports nothing of this repo; every script opens with a docstring."""
    bound, modules = imports(TREES[script])
    assert script.parent != ROOT or not (bound | modules) & {path.stem for path in SCRIPTS}
    assert ast.get_docstring(TREES[script])

"""The laws of the layout that can be counted: what lies where, how long and how dense a page is, what imports what."""

import ast
import io
import re
import statistics
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIB = (
    *"augment norms errors files log processes cli".split(),
    *"encoders tensors nearest pictures sources".split(),
)
HARNESS = "checkpoint foreign state settings measure run judging".split()
PAGES = ("regularizers", "models", "data", "knn_eval", "linear_eval", "pretrain")
FLOORS = [  # from the ground: a file imports files of lower floors, and of its own floor those before it
    [f"lib.{name}" for name in LIB],
    ["regularizers"],
    ["models", "data"],
    [f"harness.{name}" for name in HARNESS],
    ["knn_eval", "linear_eval"],
    ["pretrain"],
]
MODULES = [module for floor in FLOORS for module in floor]
FSTRING_START = getattr(tokenize, "FSTRING_START", None)  # from Python 3.12 on; before, an f-string is one token
FSTRING_END = getattr(tokenize, "FSTRING_END", None)


def path_of(module):
    return ROOT / f"{module.replace('.', '/')}.py"


def imports_of(path):
    """All modules that a file imports, wherever in it, a folder resolved to the modules taken from it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ("lib", "harness"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def tokens_by_line(path):
    """The number of tokens of each code line, without docstrings, comments and blanks."""
    source = path.read_text()
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    counts, depth = {}, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type == FSTRING_END:
            depth -= 1
        elif token.type not in silent and line not in docstrings and depth == 0:
            counts[line] = counts.get(line, 0) + 1
        if token.type == FSTRING_START:
            depth += 1
    return list(counts.values())


def test_the_top_level_holds_the_six_pages():
    assert {path.stem for path in ROOT.glob("*.py")} == set(PAGES)
    assert {path.stem for path in (ROOT / "lib").glob("*.py")} == {"__init__", *LIB}
    assert {path.stem for path in (ROOT / "harness").glob("*.py")} == {"__init__", *HARNESS}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short_and_its_lines_are(page):
    assert len(path_of(page).read_text().splitlines()) <= 320
    counts = tokens_by_line(path_of(page))
    assert statistics.mean(counts) <= 11.5
    assert sum(count > 25 for count in counts) <= 0.06 * len(counts)


def test_the_pages_together_read_in_one_sitting():
    assert sum(len(path_of(page).read_text().splitlines()) for page in PAGES) <= 1500


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    ours = {name for name in imports_of(path_of(module)) if name.split(".")[0] in (*PAGES, "lib", "harness", "tools")}
    assert ours <= set(MODULES[: MODULES.index(module)]), f"{module} stands too low for what it imports"


def test_what_others_copy_needs_little():
    for module, packages in (
        ("regularizers", {"torch"}),
        ("lib.norms", {"torch"}),
        ("lib.augment", {"numpy", "torch", "torchvision"}),
    ):
        tops = {name.split(".")[0] for name in imports_of(path_of(module))}
        assert tops - {*sys.stdlib_module_names} == packages, module
    assert {name.split(".")[0] for name in imports_of(path_of("models"))} - {*sys.stdlib_module_names} == {
        "torch",
        "lib",
        "regularizers",
    }


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_says_what_it_does(module):
    tree = ast.parse(path_of(module).read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name}"


def test_the_readme_is_for_visitors():
    text = (ROOT / "README.md").read_bytes()
    assert text.count(b"\n") <= 160 and len(text) <= 10_000


def test_links_of_readme_and_docs_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"

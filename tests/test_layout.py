"""The laws of the layout that can be counted: what lies where, how long and how dense a page is, what imports what."""

import ast
import collections
import graphlib
import io
import re
import statistics
import sys
import tokenize

from conftest import ROOT

LIB = "augment norms rivals errors files log processes cli encoders tensors nearest pictures sources".split()
HARNESS = "checkpoint foreign state settings measure run judging".split()
PAGES = ("regularizers", "models", "data", "knn_eval", "linear_eval", "pretrain")
MODULES = [  # from the ground: a file imports those before it
    *[f"lib.{name}" for name in LIB],
    *("regularizers", "models", "data"),
    *[f"harness.{name}" for name in HARNESS],
    *("knn_eval", "linear_eval", "pretrain"),
]
OURS = (*PAGES, "lib", "harness", "tools", "tests")
FSTRING_START = getattr(tokenize, "FSTRING_START", None)  # from Python 3.12 on; before, an f-string is one token
FSTRING_END = getattr(tokenize, "FSTRING_END", None)


def path_of(module):
    return ROOT / f"{module.replace('.', '/')}.py"


def length_of(paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


def imports_of(path):
    """All modules that a file imports, wherever in it, a folder resolved to the modules taken from it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ("lib", "harness", "tools"):
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
    for folder, names in (".", PAGES), ("lib", ["__init__", *LIB]), ("harness", ["__init__", *HARNESS]):
        assert {path.stem for path in (ROOT / folder).glob("*.py")} == set(names)


def test_pages_are_short_and_their_lines_are():
    for page in PAGES:
        counts = tokens_by_line(path_of(page))
        assert length_of([path_of(page)]) <= 320, page
        assert statistics.mean(counts) <= 11.5, page
        assert sum(count > 25 for count in counts) <= 0.06 * len(counts), page
    assert length_of(map(path_of, PAGES)) <= 1500
    assert length_of([*(ROOT / "lib").glob("*.py"), *(ROOT / "harness").glob("*.py")]) <= 3600


def test_imports_go_down_and_in_no_circle():
    """Nothing here imports tools or tests."""
    for i, module in enumerate(MODULES):
        ours = {name for name in imports_of(path_of(module)) if name.split(".")[0] in OURS}
        assert ours <= set(MODULES[:i]), f"{module} stands too low for what it imports"
    tools = {f"tools.{path.stem}": imports_of(path) for path in (ROOT / "tools").glob("*.py")}
    graphlib.TopologicalSorter({tool: ours & tools.keys() for tool, ours in tools.items()}).prepare()  # CycleError


def test_a_test_file_imports_no_test_file():
    for path in (ROOT / "tests").glob("*.py"):
        names = {name.split(".")[-1] for name in imports_of(path)}
        assert not any(name.startswith("test_") for name in names), path.name


def test_what_others_copy_needs_little():
    needed = {
        "regularizers": {"torch"},
        "lib.norms": {"torch"},
        "lib.rivals": {"torch"},
        "lib.augment": {"numpy", "torch", "torchvision"},
        "models": {"torch", "lib", "regularizers"},
    }
    for module, packages in needed.items():
        tops = {name.split(".")[0] for name in imports_of(path_of(module))}
        assert tops - {*sys.stdlib_module_names} == packages, module


def test_a_public_name_says_what_it_is_and_stands_in_one_file():
    """In two files it would mean two things."""
    places = collections.defaultdict(list)
    for module in MODULES:
        tree = ast.parse(path_of(module).read_text())
        assert ast.get_docstring(tree), module
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module}.{node.name}"
                places[node.name].append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_the_readme_is_for_visitors():
    text = (ROOT / "README.md").read_bytes()
    assert text.count(b"\n") <= 160 and len(text) <= 10_000


def test_links_of_readme_and_docs_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"

"""The house rules, held by a scan of the sources: every formula names its paper, imports point one way, no
line belongs to somebody's machine, and every name in the README's map equation -> function -> test exists.
"""

import ast
import os
import re
import sys
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("data", "tiny", "models", "scorers", "harness", "bench")
SOURCES = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).glob("[a-z]*.py"))]
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file.read_text() for file in sorted(SOURCES)}
TESTS = {file.name: file.read_text() for file in sorted((ROOT / "tests").rglob("*.py"))}
# The order in which the equation files may import each other: only what stands further left.
ORDER = {"sde": 0, "kl": 1, "grpo": 2, "opd": 3, "nft": 3, "merge": 0}
# Plumbing of tensors' shapes and types, which no paper has an equation for.
PLUMBING = {"full_precision", "same_shape", "flat_reduce", "require_noise"}
SOURCE = re.compile(r"\bEq\. \d|§|\bfindings? \d|Flow-(OPD|GRPO|CPS)|DiffusionNFT|SD3")
LONGEST_FUNCTION, LEAST_PROSE = 50, 0.3
README = ROOT / "README.md"
needs_readme = pytest.mark.skipif(not README.exists(), reason="README.md is not written yet")


def public_functions(module):
    tree = ast.parse(MODULES[module])
    return [n for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]


def imports(source):
    """Top-level names of every module that a source imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# ------------------------------------------------------------------------------------------------- docstrings
@pytest.mark.parametrize("module", ORDER)
def test_every_public_function_of_an_equation_file_says_where_it_is_from(module):
    lacking = {f.name for f in public_functions(module) if not SOURCE.search(ast.get_docstring(f) or "")}
    assert lacking <= PLUMBING


def test_the_plumbing_is_documented_and_the_list_of_it_is_not_stale():
    functions = {f.name: ast.get_docstring(f) or "" for m in ORDER for f in public_functions(m)}
    assert set(functions) >= PLUMBING
    assert all(len(functions[name]) > 40 for name in PLUMBING)
    assert not any(SOURCE.search(functions[name]) for name in PLUMBING), "no plumbing: it names a paper"


@pytest.mark.parametrize("module", ORDER)
def test_public_functions_of_the_equation_files_have_type_hints(module):
    for f in public_functions(module):
        assert f.returns is not None, f.name
        for argument in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs):
            assert argument.annotation is not None, f"{f.name}({argument.arg})"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_opens_by_saying_what_it_is_for(module):
    assert len(ast.get_docstring(ast.parse(MODULES[module])) or "") > 80


@pytest.mark.parametrize("module", ORDER)
def test_equation_files_are_one_third_prose(module):
    """Share of lines that belong to a docstring or hold nothing but a comment."""
    lines = [line.strip() for line in MODULES[module].splitlines()]
    prose = {i for i, line in enumerate(lines) if line.startswith("#")}
    for node in ast.walk(ast.parse(MODULES[module])):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            prose |= set(range(node.body[0].lineno - 1, node.body[0].end_lineno))
    assert len(prose) / len([line for line in lines if line]) >= LEAST_PROSE


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_longer_than_a_screen(module):
    for node in ast.walk(ast.parse(MODULES[module])):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{module}.{node.name}"


# ---------------------------------------------------------------------------------------------------- imports
@pytest.mark.parametrize("module", ORDER)
def test_equation_files_import_torch_the_standard_library_and_lower_equation_files_only(module):
    for name in imports(MODULES[module]):
        lower = name in ORDER and ORDER[name] < ORDER[module]
        assert name == "torch" or name in sys.stdlib_module_names or lower, name
    if module == "merge":
        assert not set(imports(MODULES[module])) & set(MODULES)


BENCHES = {"bench.flow_opd", "bench.qwen_rl"}


@pytest.mark.parametrize(("module", "users"), [("train", BENCHES), ("eval", {"train", *BENCHES})])
def test_only_the_scripts_above_them_import_train_and_eval(module, users):
    assert {name for name, source in MODULES.items() if module in imports(source)} <= users


def test_the_modules_of_the_project_import_each_other_without_a_cycle():
    left = {name: set(imports(source)) & set(MODULES) for name, source in MODULES.items()}
    while left:
        free = {name for name, needs in left.items() if not needs & set(left)}
        assert free, f"a cycle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def test_settings_and_its_presets_import_the_standard_library_only():
    assert set(imports(MODULES["settings"])) - set(sys.stdlib_module_names) == {"presets"}
    assert set(imports(MODULES["presets"])) <= set(sys.stdlib_module_names)


# --------------------------------------------------------------------------------- nobody's machine, no stubs
TEXT = {".py", ".md", ".toml", ".json", ".jsonl", ".txt", ".yml", ".yaml", ".sh", ".cfg", ".ini", ""}
SKIPPED = {".git", ".venv", "runs", "build", "__pycache__", ".pytest_cache", ".ruff_cache"}


def texts():
    """(path, text) of every text file that belongs to the project."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in SKIPPED and not name.endswith(".egg-info")]
        for file in (Path(folder) / name for name in sorted(files)):
            if file.suffix in TEXT:
                yield file.relative_to(ROOT), file.read_text(encoding="utf-8", errors="replace")


PRIVATE = re.compile(
    r"(?<![\w.])(10|127|192\.168|172\.(1[6-9]|2\d|3[01]))(\.\d{1,3}){2,3}(?![\w.])"  # addresses
    r"|(?<![\w.])/(work|root|home|Users)(?![\w-])"  # folders
    r"|\bTODO\b|\bFIXME\b|\bXXX\b"  # placeholders
)


def test_no_file_mentions_an_address_a_home_folder_or_a_placeholder():
    own = Path("tests/pipeline") / Path(__file__).name  # the pattern and its examples stand here
    found = [(str(path), m[0]) for path, text in texts() if path != own for m in PRIVATE.finditer(text)]
    assert found == []


def test_the_scan_for_private_mentions_sees_them():
    for text in (
        "http://10.1.2.3:80",
        "192.168.0.1",
        "172.20.1.1",
        "at /root/x",
        '"/home/me"',
        "/work/",
        "TODO",
    ):
        assert PRIVATE.search(text), text
    for text in ("torch==2.13.0", "0.10.1", "network/workers", "1/rooted", "10.5", "a/root of b"):
        assert not PRIVATE.search(text), text
    assert sum(1 for _ in texts()) > 20


def test_sources_are_written_in_latin_letters_and_greek_symbols():
    for name, text in (MODULES | TESTS).items():
        letters = {c for c in text if ord(c) > 127 and c.isalpha()}
        assert all(unicodedata.name(c).startswith(("LATIN", "GREEK")) for c in letters), (name, letters)


# ------------------------------------------------------------------------------------------ marked departures
MARK = re.compile(r"\b(?:ERRATUM|DEVIATION)\b")
SENTENCE = re.compile(r"(?:ERRATUM|DEVIATION)\b[^:\n]{0,50}:\s+(?:#\s*)?(?:\S+\s+(?:#\s*)?){5,}\S+")


def test_every_marked_departure_is_followed_by_a_sentence():
    count = 0
    for name, text in MODULES.items():
        for mark in MARK.finditer(text):
            count += 1
            assert SENTENCE.match(text, mark.start()), f"{name}: {text[mark.start() : mark.start() + 60]!r}"
    assert count >= 20, "the papers' contradictions are stated where they are met"


def test_the_scan_for_marks_refuses_an_empty_one():
    assert SENTENCE.match("DEVIATION: both papers write the drift with a minus, here.")
    assert SENTENCE.match("ERRATUM (F Eq. 11): the prefactor is\n# one over the number of steps.")
    for empty in ("DEVIATION:", "DEVIATION both papers write the drift with a minus", "ERRATUM: see above"):
        assert not SENTENCE.match(empty), empty


# ------------------------------------------------------------------------------------------------- the README
NAME = re.compile(
    r"`(\w+)\.([A-Za-z_]\w*)(?:\.(\w+))?(?:\([^`]*\))?`"
)  # `module.function`, `module.Class.method(...)`
TEST = re.compile(r"`(?:tests/)?(test_\w+\.py)::(\w+)(?:\[[^`]*\])?`")


def top_level(source):
    """{name: members of it where it is a class} for what a module defines at its top level."""
    names = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = {m.name for m in ast.walk(node) if isinstance(m, ast.FunctionDef)}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id: set() for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return names


def unresolved(text):
    """Names in a markdown text, `module.function` or `test_x.py::name`, that do not exist."""
    known = {module: top_level(source) for module, source in MODULES.items()}
    tests = {file: top_level(source) for file, source in TESTS.items()}
    for module, name, member in NAME.findall(text):
        if module in known and name not in ("py", "md", "txt", "json", "jsonl"):
            definition = known[module].get(name)
            if definition is None or (member and member not in definition):
                yield f"{module}.{name}" + (f".{member}" if member else "")
    yield from (f"{file}::{name}" for file, name in TEST.findall(text) if name not in tests.get(file, ()))


@needs_readme
def test_every_name_in_the_readme_exists():
    assert list(unresolved(README.read_text())) == []


def test_the_readme_check_resolves_what_exists_and_nothing_else():
    good = "`kl.velocity_kl` `opd.ESTIMATORS` `flow.FlowModel.velocity` `sde.time_grid(n, 3)` `train.txt`"
    assert list(unresolved(good + " `torch.randn` `test_docs.py::unresolved`")) == []
    bad = "`kl.velocity` `flow.FlowModel.fly` `test_docs.py::test_no` `tests/test_no.py::test_x`"
    assert list(unresolved(bad)) == [
        "kl.velocity",
        "flow.FlowModel.fly",
        "test_docs.py::test_no",
        "test_no.py::test_x",
    ]


@needs_readme
def test_the_readme_has_a_map_from_equations_to_functions_to_tests():
    rows = [line for line in README.read_text().splitlines() if line.startswith("|") and TEST.search(line)]
    assert len(rows) >= 15
    for row in rows:
        assert any(m[1] in MODULES for m in NAME.finditer(row)), f"no function in the row {row}"


@needs_readme
def test_every_public_function_of_the_equation_files_is_in_the_readme():
    text = README.read_text()
    functions = [f"{module}.{f.name}" for module in ORDER for f in public_functions(module)]
    missing = [name for name in functions if not re.search(rf"`{re.escape(name)}(?:\([^`]*\))?`", text)]
    assert missing == []


@needs_readme
def test_relative_links_and_pictures_of_the_readme_exist():
    for target in re.findall(r"\]\(([^)#\s]+)\)", README.read_text()):
        assert "://" in target or (ROOT / target).exists(), target

"""The house rules: what the top level holds, which way imports point, and that every page names what exists."""

import ast
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EQUATIONS = {  # each equation file, and which of the others it may import
    "sde": (), "kl": ("sde",), "grpo": ("sde", "kl"), "nft": ("sde", "kl"), "opd": ("sde", "kl", "grpo"),
    "merge": ("sde",), "rewards": (), "reward_model": ("sde", "rewards"),
}  # fmt: skip
FOLDERS = ("data", "tiny", "models", "scorers", "harness", "bench")
TOP = {
    *(f"{name}.py" for name in (*EQUATIONS, "settings", "train", "eval")), "README.md", "LICENSE", "Makefile",
    "pyproject.toml", "requirements.lock", ".gitignore", ".ci", *FOLDERS, "docs", "tests", "assets",
}  # fmt: skip
# From the foundation up: a file imports from its own level and from those before it.
LEVELS = (*FOLDERS[:-1], "eval", "train", "bench")
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
SOURCES = {p: (ROOT / p).read_text() for p in TRACKED if p.endswith(".py") and not p.startswith("tests/")}
PAGES = [p for p in TRACKED if p.endswith(".md")]


def imports(source):
    """Full names of all modules that a source imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_the_top_level_holds_what_the_table_of_contents_says():
    assert {path.split("/")[0] for path in TRACKED} == TOP


@pytest.mark.parametrize("name", EQUATIONS)
def test_an_equation_file_imports_torch_numpy_the_standard_library_and_lower_equation_files_only(name):
    allowed = {"torch", "numpy", *sys.stdlib_module_names, *EQUATIONS[name]}
    assert {module.split(".")[0] for module in imports(SOURCES[f"{name}.py"])} <= allowed


def test_imports_point_one_way():
    def level(module):
        first = module.split(".")[0]
        return LEVELS.index(first) if first in LEVELS else -1

    for path, source in SOURCES.items():
        own = path.removesuffix(".py").replace("/", ".")
        for module in imports(source):
            if own != "settings" and level(own) >= 0 and module != "data.common":
                assert level(module) <= level(own), f"{path} imports {module}"
            if own.split(".")[0] in ("data", "tiny", "models", "scorers"):
                assert module != "settings", f"{path} takes values, not settings"
    assert set(imports(SOURCES["settings.py"])) <= sys.stdlib_module_names


PRIVATE = re.compile(
    r"(?<![\w.])(10|192\.168|172\.(1[6-9]|2\d|3[01]))(\.\d{1,3}){2,3}(?![\w.])"  # addresses of somebody's network
    r"|(?<![\w.])/(work|root|home|Users)/"  # folders of somebody's machine
    r"|\bTODO\b|\bFIXME\b|\bXXX\b"  # placeholders
)


def test_no_file_names_an_address_a_home_folder_or_a_placeholder():
    own = Path(__file__).resolve().relative_to(ROOT).as_posix()
    suffixes = (".py", ".md", ".toml", ".json", ".sh", "Makefile", "run")
    texts = {p: (ROOT / p).read_text() for p in TRACKED if p.endswith(suffixes) and p != own}
    assert [(path, m[0]) for path, text in texts.items() for m in PRIVATE.finditer(text)] == []
    assert PRIVATE.search("http://10.1.2.3:80") and PRIVATE.search("at /root/x") and not PRIVATE.search("0.10.1")


# ----------------------------------------------------------------------------------------------------- the pages
NAME = re.compile(r"`((?:\w+\.)?\w+)\.([A-Za-z_]\w*)(?:\([^`]*\))?`")  # `module.function` or `folder.module.function`
TEST = re.compile(r"`(test_\w+)`")


def defined(path):
    """The names that a file defines at its top level."""
    names = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def unresolved(text):
    """Names in a page that do not exist: `module.function`, `test_x.py::name`, and paths of files."""
    modules = {path.removesuffix(".py").replace("/", "."): path for path in SOURCES}
    for module, name in NAME.findall(text):
        if module in modules and name not in ("py", "json", "txt") and name not in defined(modules[module]):
            yield f"{module}.{name}"
    proofs = set().union(*(defined(path) for path in TRACKED if path.startswith("tests/equations/")))
    yield from (name for name in TEST.findall(text) if name not in proofs)
    for link in re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", text, flags=re.S)):
        if "://" not in link and not any((ROOT / folder / link).exists() for folder in ("", "docs")):
            yield link


@pytest.mark.parametrize("page", PAGES)
def test_every_name_and_link_of_a_page_exists(page):
    assert list(unresolved((ROOT / page).read_text())) == []


def test_the_check_of_pages_sees_what_is_missing():
    assert list(unresolved("`sde.time_grid` `test_log_prob_equals_torch_normal` [a](README.md) `torch.randn`")) == []
    wrong = "`sde.time_crid` `test_gone` [a](nowhere.md)"
    assert list(unresolved(wrong)) == ["sde.time_crid", "test_gone", "nowhere.md"]


def test_every_public_function_of_an_equation_file_is_called_by_the_pipeline():
    read = set()  # names in code; those in docstrings and comments are no calls
    for node in (node for source in SOURCES.values() for node in ast.walk(ast.parse(source))):
        read.add(node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", ""))
    for name in EQUATIONS:
        own = (n.name for n in ast.parse(SOURCES[f"{name}.py"]).body if isinstance(n, ast.FunctionDef))
        assert {n for n in own if not n.startswith("_")} <= read, f"only tests call a function of {name}.py"


def test_every_row_of_the_map_names_a_function_and_its_proof():
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and TEST.search(line)]
    assert len(rows) >= 25 and all(NAME.search(row) for row in rows)


KINDS = {"ERRATUM": "Errata", "DEVIATION": "Departures", "SILENT": "Silent"}  # a mark, and its section in PAPERS.md
MARK = re.compile(r"\b(ERRATUM|DEVIATION|SILENT)\b(?: \(([^)]+)\):)?")  # KIND (PLACE): what is so
ROW = re.compile(r"^- \*\*(.+?)\*\* \((`[^)]+`)\): ", re.M)  # - **PLACE** (`file.py`, ...): what is so


def test_every_mark_in_the_code_has_its_row_in_papers_md_and_every_row_its_mark():
    page, rows = (ROOT / "docs/PAPERS.md").read_text(), Counter()
    for kind, title in KINDS.items():
        section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
        found = [(place, file) for place, files in ROW.findall(section) for file in re.findall("`(.+?)`", files)]
        rows.update((kind, *row) for row in found)
    marks = Counter((*mark, path) for path, text in SOURCES.items() for mark in MARK.findall(text))
    assert marks - rows == rows - marks == Counter() and len(rows) > 50, "a mark without a row; a row without a mark"


def commands(page):
    """The commands in the fenced blocks of a page: lines that start with a program of ours."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    for block in re.findall(r"```\w*\n(.*?)```", text, re.S):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] in ("python", "torchrun", "srun"):
                yield words


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_names_flags_that_its_stage_takes(page):
    """Each `train.py` and `eval.py` line is parsed and checked as the program does it; paths need not exist."""
    from harness import cli

    for words in commands(page):
        for program in ("train.py", "eval.py"):
            if program in words:
                argv = [w for w in words[words.index(program) + 1 :] if w not in ("--dry-run", "--help", "...")]
                cli.parse(argv, program)

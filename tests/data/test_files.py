"""Prompt files: the formats that users have, the faults of a line, and the task that a prompt needs."""

import json
import re
from pathlib import Path

import pytest

from data import files as D

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
DOG = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "a photo of two dogs"}
EDIT = DOG | {"t2i_prompt": "a photo of three dogs", "image": "images/1.jpg", "prompt": "Leave two dogs."}


def write(path, *lines):
    path.write_bytes("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines).encode())
    return path


def refusal(path, task="composition", split="train"):
    """The message of the DataError that reading `path` gives; it is one line."""
    with pytest.raises(D.DataError) as error:
        D.read_prompts(path, task, split)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- good files
def test_text_files_give_one_prompt_a_line_with_its_source(tmp_path):
    file = write(tmp_path / "p.txt", "first", "", '  second "X" ', "   ", "third\u2028still third", "")
    assert D.read_prompts(str(file), "quality") == [
        D.Prompt("first", "quality", {}, f"{file}:1"),
        D.Prompt('second "X"', "quality", {}, f"{file}:3"),
        D.Prompt("third\u2028still third", "quality", {}, f"{file}:5"),
    ]
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")  # as Windows writes it
    assert [p.text for p in D.read_prompts(file, "quality")] == ["one", "two"]


def test_metadata_files_keep_the_whole_line_as_metadata(tmp_path):
    cat = {"class": "cat", "count": 1, "color": "red", "position": ["above", 1]}
    full = {"tag": "my own tag", "include": [cat, {"class": "dog", "count": 3, "position": ["below", 0]}],
            "exclude": [{"class": "dog", "count": 4}], "prompt": "a cat above three dogs", "note": 1}  # fmt: skip
    file = write(tmp_path / "m.jsonl", DOG, "", full)
    assert D.read_prompts(file, "composition") == [
        D.Prompt("a photo of two dogs", "composition", DOG, f"{file}:1"),
        D.Prompt("a cat above three dogs", "composition", full, f"{file}:3"),
    ]


def test_a_folder_gives_its_split_and_prefers_metadata(tmp_path):
    write(tmp_path / "train.txt", "train text")
    assert D.holds_split(tmp_path, "train") and not D.holds_split(tmp_path, "test")
    write(tmp_path / "test.txt", "test text")
    assert [p.text for p in D.read_prompts(tmp_path, "quality")] == ["train text"], "the default split is train"
    assert [p.text for p in D.read_prompts(tmp_path, "quality", "test")] == ["test text"]
    file = write(tmp_path / "test_metadata.jsonl", DOG)
    assert D.read_prompts(tmp_path, "composition", "test")[0].source == f"{file}:1"
    assert D.read_prompts(tmp_path / "test.txt", "quality")[0].text == "test text", "a file has no split"
    assert D.holds_split(file, "train") and D.holds_split(file, "test")


def test_the_image_of_an_edit_is_found_from_the_folder_of_its_file(tmp_path, monkeypatch):
    uri = "data:image/png;base64,AAAA"
    write(tmp_path / "e.jsonl", EDIT, EDIT | {"image": "/else/2.png"}, EDIT | {"image": uri})
    monkeypatch.chdir(tmp_path.parent)
    prompts = D.read_prompts(f"{tmp_path.name}/e.jsonl", "edit")
    assert [p.metadata["image"] for p in prompts] == [f"{tmp_path}/images/1.jpg", "/else/2.png", uri]
    assert prompts[0].text == "Leave two dogs." and prompts[0].metadata["t2i_prompt"] == "a photo of three dogs"


def test_qs_prompts_need_no_checklist_and_are_known_by_their_task_or_fields(tmp_path):
    bare, person = {"prompt": "a fox"}, {"prompt": "a nurse", "category": "portrait"}
    edit = {"prompt": "Make the sky red.", "image": "/a.png", "t2i_prompt": "a beach"}
    read = D.read_prompts(write(tmp_path / "p.jsonl", bare, person), "t2i")
    assert [(p.text, p.task, p.metadata) for p in read] == [("a fox", "t2i", bare), ("a nurse", "t2i", person)]
    assert D.read_prompts(write(tmp_path / "e.jsonl", edit), "edit")[0].metadata == edit
    assert len(D.read_prompts(write(tmp_path / "m.jsonl", person, edit), "quality")) == 2
    assert "'tag'" in refusal(write(tmp_path / "b.jsonl", bare), "quality")


REAL = {  # file: (task, lines)
    "geneval_test_metadata.jsonl": ("composition", 2212),
    "ocr_test.txt": ("text", 1018),
    "counting_edit_test_metadata.jsonl": ("edit", 112),
}


@pytest.mark.parametrize("name", REAL)
def test_the_files_that_users_have_load_and_route_to_their_own_task(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not here; the project does not ship it")
    task, count = REAL[name]
    prompts = D.read_prompts(SHARED / name, task)
    assert len(prompts) == count and {p.task for p in prompts} == {task}
    assert prompts[-1].source == f"{SHARED / name}:{count}"
    assert {D.task_of(p.text, p.metadata) for p in prompts} == {task}
    if task != "edit":  # GenEval's and OCR's prompts route alike from the words alone, as F Eq. 7's R(c) has them
        assert {D.task_of(p.text, {}) for p in prompts} == {task}


# -------------------------------------------------------------------------------------------------- bad files
def without(field, line=DOG):
    return {key: value for key, value in line.items() if key != field}


def entry(**fields):
    """A metadata line whose second include has `fields`."""
    return DOG | {"include": [{"class": "cat", "count": 1}, {"class": "cow", "count": 1} | fields]}


FAULTS = [  # task, the third line of a file, what its message names
    *(("composition", line, "JSON") for line in ('{"tag": "x",', "[1, 2]", '"prompt"')),
    *(("composition", without(field), repr(field)) for field in ("tag", "prompt", "include")),
    *(("composition", DOG | {field: bad}, f"{field!r} is {re.escape(repr(bad))}") for field, bad in (
        ("tag", 3), ("tag", ""), ("prompt", None), ("include", []), ("include", {"class": "dog"}), ("exclude", []),
        ("image", 5), ("t2i_prompt", ""), ("category", ["a"]),
    )),
    ("composition", DOG | {"include": ["dog"]}, r"include\[0\]: 'dog'"),
    ("composition", DOG | {"exclude": [{"class": "dog"}]}, r"exclude\[0\]: .*'count' is missing"),
    ("composition", DOG | {"include": [{"count": 1}]}, r"include\[0\]: .*'class' is missing"),
    ("composition", entry(**{"class": 7}), r"include\[1\]: .*'class' is 7"),
    *(("composition", entry(count=bad), rf"include\[1\]: .*'count' is {bad!r}")
      for bad in (0, -1, 1.0, "2", True, None)),
    ("composition", entry(color=["red"]), r"include\[1\]: .*'color'"),
    *(("composition", entry(position=bad), r"include\[1\]: .*'position' is " + re.escape(repr(bad)))
      for bad in ("above", ["above"], ["above", 0, 0], ["left", 0],
                  *(["above", other] for other in (1, 2, -1, 0.0, "0", False)))),
    ("t2i", {"prompt": "a fox", "include": []}, "'include'"),
    *(("edit", without(field, EDIT), f"'{field}' is missing") for field in D.EDIT_FIELDS),
    ("text", DOG, "target"),
]  # fmt: skip


@pytest.mark.parametrize("task, line, named", FAULTS)
def test_every_fault_of_a_metadata_line_is_said_with_file_line_and_field(tmp_path, task, line, named):
    good = {**EDIT, "prompt": 'Leave two "dogs".'}
    message = refusal(write(tmp_path / "m.jsonl", good, "", line), task)
    assert message.startswith(f"{tmp_path}/m.jsonl:3: ") and re.search(named, message), message


@pytest.mark.parametrize("name, content, task, where", [
    ("no.txt", None, "quality", "no.txt:0"),
    ("p.csv", b"a", "quality", "p.csv:0"),
    ("p.txt", b"", "quality", "p.txt:0"),
    ("p.jsonl", b"\n  \n", "quality", "p.jsonl:0"),
    ("p.txt", b"fine\n\nab\xff\n", "quality", "p.txt:3"),
    ("p.txt", b'a sign "OK"\n\na sign with " one', "text", "p.txt:3"),
    ("p.txt", b"make it red", "edit", "p.txt:1"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_named_with_its_line(tmp_path, name, content, task, where):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name, task).startswith(f"{tmp_path}/{where}: ")


def test_a_folder_without_the_split_and_unknown_names_are_refused(tmp_path):
    file = write(tmp_path / "train.txt", "a")
    assert re.match(rf"{tmp_path}:0: .*test_metadata.jsonl.*test.txt", refusal(tmp_path, split="test"))
    for task, split in (("ocr", "train"), ("text", "val")):
        with pytest.raises(ValueError, match="unknown"):
            D.read_prompts(file, task, split)


# ---------------------------------------------------------------------------------------------------- routing
@pytest.mark.parametrize("text, metadata, task", [
    ("a photo of a dog", {}, "composition"),
    ("  A Photo of two dogs", {}, "composition"),
    ("two dogs", DOG, "composition"),
    ('two dogs and "X"', DOG, "composition"),
    ('a photo of a sign that says "STOP"', {}, "text"),
    ('an empty pair "" is no text', {}, "quality"),
    ("a beautiful picture of two dogs", {}, "quality"),
    ("a beautiful picture of two dogs", {"include": DOG["include"]}, "quality"),
    ("a beautiful picture of two dogs", {"tag": "x"}, "quality"),
    ("this is not a photo of a dog", {}, "quality"),
    ("a photo offers", {}, "quality"),
    ("Leave two dogs.", EDIT, "edit"),
    ('add "X" to it', {"image": "1.png"}, "edit"),
])  # fmt: skip
def test_routing_takes_the_surest_sign_first(text, metadata, task):
    assert D.task_of(text, metadata) == task

"""Files that users bring, by kinds: how they are encoded and framed, what their fields mean, what cannot be earned, and
pictures. Each input has its right answer, or is refused in one line that begins with its file and line."""

import base64
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import files as D
from data import pictures as P
from data import preferences
from data.common import DataError, read_json
from rewards import RewardError
from tests.helpers.checks import refusal as _refusal

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
DOG = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "a photo of two dogs"}
EDIT = {"prompt": "Leave two dogs.", "t2i_prompt": "a photo of three dogs", "image": "images/1.jpg"}


def write(path, *lines):
    """A file of lines, each bytes, text or a JSON value, joined by newlines."""
    encoded = (x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines)
    path.write_bytes(b"\n".join(encoded))
    return path


def refusal(call, *arguments):
    return _refusal(call, *arguments, error=DataError)


# ------------------------------------------------------------------------------------------- encoding and framing
TEXT = [("first", 1), ('second "X"', 3), ("third\u2028still third", 5)]
FRAMES = {  # name: (bytes, the lines at which the three stand)
    "p.txt": ("\n".join(("first", "", '  second "X" ', " ", TEXT[2][0], "")).encode(), (1, 3, 5)),
    "windows.TXT": (b"\xef\xbb\xbf" + "\r\n".join(("first", 'second "X"', TEXT[2][0])).encode(), (1, 2, 3)),
    "old mac.txt": ("\r".join(("first", "", 'second "X"', TEXT[2][0])).encode(), (1, 3, 4)),
    "p.jsonl": ("\n".join(("", *(json.dumps({"prompt": text}) for text, _ in TEXT))).encode(), (2, 3, 4)),
    "bom.JSONL": (b"\xef\xbb\xbf" + "\r\n".join(json.dumps({"prompt": t}) for t, _ in TEXT).encode(), (1, 2, 3)),
    "array.json": (json.dumps([{"prompt": text} for text, _ in TEXT]).encode(), (1, 1, 1)),
    "array.jsonl": (
        b"\n" + json.dumps([{"prompt": t} for t, _ in TEXT], indent=1).replace("\n", "\r\n").encode(),
        (3, 6, 9),
    ),
}


@pytest.mark.parametrize("name", FRAMES)
def test_prompts_are_the_same_in_every_frame_each_with_its_line(tmp_path, name):
    content, places = FRAMES[name]
    (tmp_path / name).write_bytes(content)
    for task in ("quality", "t2i") if name.lower().endswith("txt") else ("t2i",):
        found = D.read_prompts(str(tmp_path / name), task)
        assert [(p.text, p.task) for p in found] == [(text, task) for text, _ in TEXT]
        assert [p.source for p in found] == [f"{tmp_path / name}:{line}" for line in places]


def test_a_folder_gives_its_split_and_prefers_metadata(tmp_path):
    write(tmp_path / "train.txt", "train text")
    assert D.holds_split(tmp_path, "train") and not D.holds_split(tmp_path, "test")
    write(tmp_path / "test.txt", "test text")
    for split in ("train", "test"):
        assert [p.text for p in D.read_prompts(tmp_path, "quality", split)] == [f"{split} text"]
    file = write(tmp_path / "test_metadata.jsonl", DOG)
    assert D.read_prompts(tmp_path, "composition", "test")[0].source == f"{file}:1"
    assert D.holds_split(file, "train") and D.holds_split(file, "test"), "a file has no split"
    (tmp_path / "test.txt").unlink(), file.unlink()
    assert re.match(
        rf"{tmp_path}:0: .*test_metadata.jsonl.*test.txt", refusal(D.read_prompts, tmp_path, "text", "test")
    )
    for task, split in (("ocr", "train"), ("text", "val")):
        with pytest.raises(ValueError, match="unknown"):
            D.read_prompts(tmp_path, task, split)


DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}", b'{"prompt": "p", "x": 1e999}',
        b'{"prompt": "p", "x": NaN}', b'{"prompt": "p", "x": -Infinity}', b'{"prompt": "\\ud800"}',
        b'{"prompt"', b'{"prompt": "p"} {}',
        b"]"]  # fmt: skip
BROKEN = [  # name, lines, task, the line that is named
    ("p.csv", [b"a"], "quality", 0), ("p.txt", [b""], "quality", 0), ("p.jsonl", [b"", b"  "], "t2i", 0),
    ("p.json", [b"[]"], "t2i", 0), ("p.txt", [b"fine", b"", b"ab\xff"], "quality", 3),
    ("p.txt", [b"fine\r\rab\xff"], "quality", 3), ("p.txt", ["fine".encode("utf-16")], "quality", 1),
    ("p.txt", [b"make it red"], "edit", 1), ("p.json", [b"[{}", b",", b'{"prompt": "p"}'], "t2i", 3),
    *(("p.jsonl", [EDIT, b"", content], "t2i", 3) for content in (*DEEP, b'"prompt"', b"[1]", b"3", b"null")),
    *(("p.json", [b"[", b'{"prompt": "p"},', content + b"]"], "t2i", 3) for content in DEEP),
]  # fmt: skip


@pytest.mark.parametrize(("name", "lines", "task", "line"), BROKEN, ids=lambda value: str(value)[:30])
def test_what_is_no_text_or_json_is_named_by_its_line(tmp_path, name, lines, task, line):
    file = write(tmp_path / name, *lines)
    assert refusal(D.read_prompts, file, task).startswith(f"{file}:{line}: ")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    for name in ("no.txt", "pipe.txt", "pipe.txt/x.txt", "\0.txt", "x" * 300 + ".txt"):
        assert f"{tmp_path}/{name[:9]}" in refusal(D.read_prompts, tmp_path / name, "quality")
    for name in ("no.json", "pipe.txt"):
        assert f"{tmp_path}/{name}:0: " in refusal(read_json, tmp_path / name)
    assert read_json(write(tmp_path / "bom.json", b"\xef\xbb\xbf", '{"a": [1, 2.5]}')) == {"a": [1, 2.5]}


# --------------------------------------------------------------------------------------------- what a line can say
CAT = {"class": "cat", "count": 1, "color": "red", "position": ["above", 1]}
FULL = {"tag": "my own tag", "include": [CAT, {"class": "dog", "count": 3, "position": ["below", 0]}],
        "exclude": [{"class": "dog", "count": 4}], "prompt": "a cat above three dogs", "own": []}  # fmt: skip
EMPTY = {"exclude": None, "category": None, "image": "", "target": None, "t2i_prompt": []}


@pytest.mark.parametrize("given", [EMPTY, EMPTY | {"exclude": []}])
def test_a_line_is_kept_whole_and_what_exporters_write_for_nothing_is_nothing(tmp_path, given):
    include = [{"class": "dog", "count": 2.0, "color": None, "position": None}]
    written = {**FULL, "include": [{**CAT, "position": ["above", 1.0]}, FULL["include"][1]]}
    file = write(tmp_path / "m.jsonl", DOG, {**DOG, **given, "include": include}, written)
    assert [p.metadata for p in D.read_prompts(file, "composition")] == [DOG, DOG, FULL]
    assert type(D.read_prompts(file, "composition")[1].metadata["include"][0]["count"]) is int
    bare = {"prompt": "a fox"}
    assert D.read_prompts(write(tmp_path / "q.jsonl", {**bare, **EMPTY, "include": []}), "t2i")[0].metadata == bare


def test_qs_prompts_and_those_with_a_target_need_no_checklist(tmp_path):
    lines = [
        {"prompt": "a nurse", "category": "portrait"},
        {"prompt": "a sign", "target": "营业"},
        {**EDIT, "image": "/a.png"},
    ]
    file = write(tmp_path / "p.jsonl", *lines)
    for task in ("quality", "t2i"):
        assert [p.metadata for p in D.read_prompts(file, task)] == lines
    assert D.read_prompts(write(tmp_path / "t.jsonl", lines[1]), "text")[0].metadata == lines[1]


def test_the_image_of_an_edit_is_found_from_the_folder_of_its_file(tmp_path, monkeypatch):
    uri = "data:image/png;base64,AAAA"
    several = EDIT | {"image": ["2.png", "/else/2.png", uri]}
    write(tmp_path / "e.jsonl", EDIT, EDIT | {"image": "/else/2.png"}, EDIT | {"image": uri}, several)
    monkeypatch.chdir(tmp_path.parent)
    prompts = D.read_prompts(f"{tmp_path.name}/e.jsonl", "edit")
    *one, last = [P.places(p) for p in prompts]
    assert one == [(f"{tmp_path}/images/1.jpg",), ("/else/2.png",), (uri,)]
    assert last == (f"{tmp_path}/2.png", "/else/2.png", uri) and P.places(prompts[0]._replace(metadata={})) == ()


def two(*entries, **more):
    return {"tag": "x", "prompt": "p", "include": [{"class": "cow", "count": 1}, *entries], **more}


def cat(**fields):
    return {"class": "cat", "count": 1, **fields}


def without(field, line=DOG):
    return {key: value for key, value in line.items() if key != field}


FAULTS = [  # task, the third line of a file, what its message names
    *(("composition", without(field), f"'{field}' is missing") for field in ("tag", "prompt", "include")),
    *(("composition", DOG | {field: bad}, f"'{field}'") for field, bad in (
        ("tag", 3), ("tag", " "), ("prompt", None), ("include", {"class": "dog"}), ("include", []), ("exclude", "no"),
        ("image", 5), *(("image", ["a.png", bad]) for bad in (3, " ", ["a.png"], None)),
        ("t2i_prompt", 3), ("category", ["a"]), ("target", 7), ("include", None),
    )),
    *(("composition", two(bad), r"include\[1\]: ") for bad in (
        "dog", 3, None, {"count": 1}, {"class": "cat"}, {"class": 7, "count": 1}, cat(color=["red"]),
        *(cat(count=bad) for bad in (0, -1, 1.5, "2", True, None, {}, [1])),
        *(cat(position=bad) for bad in ("above", ["above"], ["above", 0, 0], ["left", 0], {"above": 0},
                                        *(["above", other] for other in (1, 2, -1, 0.5, "0", False, None)))),
    )),
    ("composition", two(exclude=[{"class": "dog"}]), r"exclude\[0\]: .*'count' is missing"),
    *(("edit", without(field, EDIT), f"'{field}' is missing") for field in D.EDIT_FIELDS),
    *(("text", {"prompt": "a sign", "category": "x", "target": bad}, "target") for bad in (" a", "a\u00a0", "\u200b")),
    *(("text", {"prompt": text, "category": "x"}, "no target text") for text in (
        "a dog", 'one " only', 'A monitor that shows "HELLO', 'a 12" pizza next to a 14" laptop', "「open", "“a",
    )),
    # GenEval's rule looks at the same best objects of a class, at most 16, so no picture passes these
    *(("composition", two(*bad), "no picture can pass") for bad in (
        [cat(color="red"), cat(color="blue")], [cat(), cat(position=["left of", 1])], [cat(count=17)],
        [cat(position=["left of", 2]), {"class": "dog", "count": 1, "position": ["left of", 1]}],
        [{"class": "dog", "count": 1}, cat(position=["left of", 0]), cat(position=["right of", 0])],
        [cat(position=["above", 2]), {"class": "dog", "count": 1, "position": ["above", 3]},
         {"class": "bus", "count": 1, "position": ["above", 1]}],
    )),
    *(("composition", two(cat(count=2), exclude=[{"class": "cat", "count": n}]), "no picture can pass") for n in (1,
    2)),
]  # fmt: skip


@pytest.mark.parametrize("task, line, named", FAULTS, ids=lambda value: str(value)[-60:])
def test_a_line_that_says_nothing_or_what_cannot_be_earned_is_named_with_file_line_and_field(
    tmp_path, task, line, named
):
    good = {**EDIT, "prompt": 'Leave two "dogs".'}
    message = refusal(D.read_prompts, write(tmp_path / "m.jsonl", good, "", line), task)
    assert message.startswith(f"{tmp_path}/m.jsonl:3: ") and re.search(named, message), message


def test_checklists_that_can_be_earned_are_taken(tmp_path):
    for lines in (
        [cat(color="red"), cat()], [cat(count=16)], [cat(), cat(count=2)], [cat(position=["left of", 0])],
        [cat(color="red"), {"class": "dog", "count": 1, "color": "blue"}],
        [cat(position=["left of", 2]), {"class": "dog", "count": 1, "position": ["right of", 1]}],
        [cat(position=["left of", 2]), {"class": "dog", "count": 1, "position": ["above", 1]}],
    ):  # fmt: skip
        more = {"exclude": [{"class": "cat", "count": 17}, {"class": "bus", "count": 1}]}
        assert D.read_prompts(write(tmp_path / "m.jsonl", two(*lines, **more)), "composition")


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


@pytest.mark.parametrize("text, metadata, task", [
    ("a photo of a dog", {}, "composition"), ("  A Photo of two dogs", {}, "composition"), ("two dogs", DOG,
    "composition"),
    ('two dogs and "X"', DOG, "composition"), ('a photo of a sign that says "STOP"', {}, "text"), ("写着「营业中」", {},
    "text"),
    ("a sign that says “OPEN”", {}, "text"), ("a sign", {"target": "OPEN"}, "text"),
    ("a dog's “bed", {}, "quality"), ('A 27" screen, "HELLO" on it', {}, "text"), ('a 6"x9" print', {}, "quality"),
    ("a sign, 'OPEN'", {}, "text"), ("the dogs' 'n' cats' beds", {}, "quality"), ("a «menu»", {}, "text"),
    ('an empty pair "" is no text', {}, "quality"), ('a 12" pizza next to a 14" laptop', {}, "quality"),
    ("a picture of two dogs", {"include": DOG["include"]}, "quality"), ("a picture of two dogs", {"tag": "x"},
    "quality"),
    ("this is not a photo of a dog", {}, "quality"), ("a photo offers", {}, "quality"), ("Leave two dogs.", EDIT,
    "edit"),
    ('add "X" to it', {"image": "1.png"}, "edit"),
])  # fmt: skip
def test_routing_takes_the_surest_sign_first(text, metadata, task):
    assert D.task_of(text, metadata) == task


# ------------------------------------------------------------------------------------------------------- pictures
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)


def source(image, line=3):
    return D.Prompt("Make it red.", "edit", {"image": str(image)}, f"mine.jsonl:{line}")


def encoded(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def uri(content):
    return P.PNG_URI + base64.b64encode(content).decode()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise by a quarter"
    return encoded(PICTURE, exif=exif)


def half_clear(mode):
    """The picture, its left half transparent over a hidden colour -> as a reader sees it on paper."""
    picture, seen = PICTURE.convert("RGBA"), PIXELS.copy()
    alpha = np.full((40, 56), 255, np.uint8)
    alpha[:, :28], seen[:, :28] = 0, 255
    picture.putalpha(Image.fromarray(alpha))
    if mode == "LA":
        seen = np.asarray(PICTURE.convert("L"))[..., None].repeat(3, -1).copy()
        seen[:, :28] = 255
        return encoded(picture.convert("LA")), seen
    return encoded(picture, "WEBP" if mode == "WEBP" else "PNG", lossless=True), seen


GREY16 = (PIXELS[..., 0].astype(np.uint16) * 257)  # fmt: skip
GREY = PIXELS[..., :1].repeat(3, -1)
SEEN = {  # name: (file, pixels)
    "rgb": (encoded(PICTURE), PIXELS), "webp": (encoded(PICTURE, "WEBP", lossless=True), PIXELS),
    "grey": (encoded(PICTURE.getchannel(0)), GREY), "16 bits of grey": (encoded(Image.fromarray(GREY16)), GREY),
    "16 bits between": (encoded(Image.fromarray(GREY16 + np.uint16(0) - (GREY16 > 0) * np.uint16(128))), GREY),
    "opaque": (encoded(PICTURE.convert("RGBA")), PIXELS), "turned": (turned(), np.rot90(PIXELS, -1)),
    "clear": half_clear("RGBA"), "clear grey": half_clear("LA"), "clear webp": half_clear("WEBP"),
    "one clear colour": (encoded(PICTURE, transparency=tuple(map(int, PIXELS[0, 0]))),
                         np.where((PIXELS[0, 0] == PIXELS).all(-1, keepdims=True), 255, PIXELS)),
    "palette": (encoded(PICTURE.quantize(17)), np.asarray(PICTURE.quantize(17).convert("RGB"))),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_a_picture_is_what_a_reader_sees_from_a_file_and_from_the_line_itself(tmp_path, name):
    content, pixels = SEEN[name]
    (tmp_path / "a").write_bytes(content)  # whatever its name
    for where in (tmp_path / "a", uri(content)):
        found = P.source_images(source(where))[0]
        assert found.dtype == np.uint8 and np.array_equal(found, pixels)
        P.check_sources(source(where))


def test_a_tensor_becomes_the_nearest_bytes_in_rgb_and_what_is_no_number_is_an_error_and_not_black():
    image = torch.tensor([[[-0.5, 0.1, 1.5]], [[0.0, 0.5, 1.0]], [[0.25, 0.75, 2 / 255]]])  # (3, 1, 3)
    found = P.to_picture(image.double().requires_grad_())
    # 0.1, 0.25, 0.5 and 0.75 times 255 are 25.5, 63.75, 127.5 and 191.25; halves go to the even one
    assert np.asarray(found)[0].tolist() == [[0, 0, 64], [26, 128, 191], [255, 255, 2]] and found.mode == "RGB"
    for bad in (np.nan, np.inf, -np.inf):
        image[2, 0, 1] = bad
        _refusal(P.to_picture, image, error=RewardError)


def test_sources_are_tensors_none_for_other_prompts_and_read_once_while_they_are_kept(tmp_path):
    drawn, plain = P.data_uri(torch.from_numpy(PIXELS).permute(2, 0, 1) / 255), D.Prompt("a fox", "t2i", {}, "x:1")
    assert P.sources([plain, plain]) is None and P.check_sources(plain) is None
    none, (one,) = P.sources([plain, source(drawn)])
    assert none is None and torch.equal(one, torch.from_numpy(PIXELS.copy()).permute(2, 0, 1) / 255)
    PICTURE.save(tmp_path / "a.png")
    first = P.source_images(source(tmp_path / "a.png", 1))[0]
    assert P.source_images(source(tmp_path / "a.png", 2))[0] is first
    for number in range(P.CACHED_PICTURES):
        P.source_images(source(uri(encoded(Image.new("RGB", (1, number + 1))))))
    assert P.source_images(source(tmp_path / "a.png"))[0] is not first, "and not for ever"


WHOLE = encoded(PICTURE)
NONE = {
    "no.png": None, "words.png": b"no picture", "empty.png": b"",
    "flipped.png": WHOLE[:60] + bytes([WHOLE[60] ^ 1]) + WHOLE[61:],
    **{f"half.{kind.lower()}": (whole := encoded(PICTURE, kind))[: len(whole) // 2] for kind in ("PNG", "JPEG",
    "WEBP")},
    "almost.jpeg": encoded(PICTURE, "JPEG")[:-40], "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    **{f"other.{kind.lower()}": encoded(PICTURE, kind) for kind in ("BMP", "GIF", "TIFF", "PPM")},
}  # fmt: skip


@pytest.mark.parametrize("name", [*NONE, "folder", "pipe", "huge", "data:image/png,raw", "data:image/png;base64,!!"])
def test_a_picture_that_cannot_be_used_is_named_by_its_line_before_anything_is_drawn(tmp_path, monkeypatch, name):
    where = name if name.startswith("data:") else tmp_path / name
    if name in ("folder", "pipe"):
        os.mkdir(where) if name == "folder" else os.mkfifo(where)
    elif name == "huge":
        where.write_bytes(encoded(Image.new("1", (8193, 8192))))
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded before its size was looked at"))
    elif NONE.get(name) is not None:
        where.write_bytes(NONE[name])
    shown = "the image in the line" if name.startswith("data:") else str(where)
    for look in (P.check_sources, P.source_images):
        assert refusal(look, source(where)).startswith(f"mine.jsonl:3: {shown}: ")
    if not name.startswith("data:"):
        line = {"image": name, "prompt": "p", "score": 4}
        assert f"marks.jsonl:1: {where}: " in refusal(
            preferences.read, write(tmp_path / "marks.jsonl", line), "pointwise"
        )


# ------------------------------------------------------------------------------------------------------ preferences
GOOD = {"image": "a.png", "prompt": "p", "score": 4}
PAIR = {"image_w": "a.png", "image_l": "images/b.png", "prompt": "p"}


@pytest.fixture
def marked(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "images/b.png"):
        PICTURE.save(tmp_path / name)
    return tmp_path


def test_marks_and_pairs_are_read_in_order_with_paths_relative_to_their_file(marked):
    a, b = marked / "a.png", marked / "images/b.png"
    lines = [GOOD, {"image": str(b), "prompt": "q", "score": 2.5, "annotator": "kept out"}]
    for name, content in (("m.jsonl", [lines[0], "", lines[1]]), ("m.json", [lines])):
        found = preferences.read(write(marked / name, *content), "pointwise")
        assert found == [preferences.Sample(a, "p", 4.0), preferences.Sample(b, "q", 2.5)]
    assert preferences.read(str(write(marked / "p.jsonl", PAIR)), "pairwise") == [preferences.Pair(a, b, "p")]
    for file in (marked / "no.jsonl", write(marked / "empty.jsonl", b"", b" ")):
        assert refusal(preferences.read, file, "pointwise").startswith(f"{file}:0: ")


BAD = [
    *(("pointwise", bad) for bad in (
        b"{", [1], 3, GOOD | {"prompt": ""}, GOOD | {"image": 3}, PAIR, GOOD | {"score": 0}, GOOD | {"score": 5.01},
        GOOD | {"score": True}, GOOD | {"score": "4"}, b'{"image": "a.png", "prompt": "p", "score": NaN}',
        without("score", GOOD),
    )),
    *(("pairwise", bad) for bad in (GOOD, without("image_l", PAIR), PAIR | {"image_l": "none.png"})),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "line"), BAD, ids=str)
def test_a_bad_mark_is_named_by_file_and_line(marked, objective, line):
    file = write(marked / "m.jsonl", PAIR if objective == "pairwise" else GOOD, b"", line)
    assert refusal(preferences.read, file, objective).startswith(f"{file}:3: ")


def test_the_holdout_is_a_share_of_the_prompts_the_same_one_everywhere():
    samples = [preferences.Sample(None, f"prompt {i // 2}", 3.0) for i in range(4000)]
    training, held = preferences.split(samples, 0.2)
    assert len(training) + len(held) == 4000 and 0.17 < len(held) / 4000 < 0.23
    assert not {s.prompt for s in training} & {s.prompt for s in held}, "both pictures of a prompt are on one side"
    pairs = [preferences.Pair(None, None, s.prompt) for s in reversed(samples)]
    assert {p.prompt for p in preferences.split(pairs, 0.2)[1]} == {s.prompt for s in held}, "whatever else is in it"
    assert {s.prompt for s in held} < {s.prompt for s in preferences.split(samples, 0.3)[1]}, "a larger share keeps it"

"""What a prompt says of its content: GenEval's checklists and sentences, its mix of tags, and the split."""

import hashlib
from collections.abc import Mapping, Sequence

from rewards import MAX_PER_CLASS

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# GenEval's own training mix. `single_object` is never trained on, so its test score is out of distribution.
TAG_MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
TEST_TAGS = ("single_object", *TAG_MIX)


def in_test_split(*content: object) -> bool:
    """One content in four is kept for evaluation. A hash of it decides, so that no list has to be stored."""
    return hashlib.sha256(repr(content).encode()).digest()[1] % 4 == 0


def include(name: str, count: int = 1, color: str | None = None, position: list | None = None) -> dict:
    """One entry of GenEval's `include` list. Absent fields stay absent, as in GenEval's own files."""
    entry = {"class": name, "count": count, "color": color, "position": position}
    return {field: value for field, value in entry.items() if value}


def checklist(tag: str, *entries: dict, **more: list) -> tuple[str, dict]:
    """(sentence, metadata line) of a prompt; more: an `exclude` list."""
    text = sentence(entries)
    return text, {"tag": tag, "include": list(entries), **more, "prompt": text}


def counting(name: str, count: int) -> tuple[str, dict]:
    """`checklist` of so many things of a class and not one more."""
    return checklist("counting", include(name, count), exclude=[include(name, count + 1)])


def sentence(entries: Sequence[Mapping]) -> str:
    """GenEval's prompt for its `include` list, e.g. "a photo of a cow right of a laptop". F §6.1.

    One object with a `position` is named first, then the one it refers to; all others are joined by "and".
    Reproduces every line of GenEval's file. Raises KeyError for a count without a word (above four).
    """
    for entry in entries:
        if "position" in entry:
            relation, other = entry["position"]
            return f"a photo of {phrase(entry)} {relation} {phrase(entries[other])}"
    return "a photo of " + " and ".join(map(phrase, entries))


def phrase(entry: Mapping) -> str:
    """One object as GenEval names it: "a cow", "an orange tv", "three benchs", and "a scissors"."""
    name = f"{entry['color']} {entry['class']}" if "color" in entry else entry["class"]
    if entry["count"] > 1:
        return f"{NUMBERS[entry['count']]} {plural(name)}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """ERRATUM (GenEval): it makes every plural with s, or es after an s, and so writes "four knifes" and "two sheeps".
    Kept, because models are tested on those sentences."""
    return name + ("es" if name.endswith("s") else "s")


def impossible(metadata: Mapping) -> str:
    """Why no picture can pass a checklist under `rewards.geneval_verdict`, in words; "" if one can. F §6.1 (GenEval).

    Every include of a class looks at the same best objects of it, at most `MAX_PER_CLASS`.
    """
    entries, exclude = metadata.get("include", ()), metadata.get("exclude", ())
    for i, entry in enumerate(entries):
        name, count = entry["class"], entry["count"]
        colors = {e["color"] for e in entries if e["class"] == name and "color" in e}
        if count > MAX_PER_CLASS:
            return f"include[{i}]: {count} of {name!r}, of which at most {MAX_PER_CLASS} are counted"
        if len(colors) > 1:
            return f"include[{i}]: the same {name!r} in {' and '.join(sorted(colors))}"
        if any(e["class"] == name and e["count"] <= count for e in exclude):
            return f"include[{i}]: {count} of {name!r}, and an exclude forbids so many"
        places = {tuple(e["position"]) for e in entries if e["class"] == name and e.get("position")}
        if any((OPPOSITE.get(relation), other) in places for relation, other in places):
            return f"include[{i}]: the same {name!r} on two opposite sides of one thing"
        relation, passed = entry.get("position", [""])[0], [i]
        while entries[passed[-1]].get("position", [None])[0] == relation:  # a chain such as left of, left of, ...
            passed.append(entries[passed[-1]]["position"][1])
            if entries[passed[-1]]["class"] == name:
                return f"include[{i}]: {name!r} {relation} itself"
            if passed[-1] in passed[:-1]:
                break
    return ""

"""Which prompts can a policy learn from? Q 4.2, prompt curation.

The policy draws G samples of every candidate prompt, and the run's rewards score them. The prompt's *range* is the
largest score less the smallest. If it is zero, so are the group's advantages (Q Eq. 4): a prompt that is always solved,
or never, costs G samples and teaches nothing. Only prompts whose range is above a threshold are kept. SILENT (Q 4.2):
the threshold, the number of samples and the reward's scale are not given, and a range grows with G. So thresholds can
be compared for one G and one set of rewards only.

    ranges/rank-N.jsonl   one line a prompt, as soon as it is known
    prompts/TASK/         what is kept, in the formats of `data/files.py`: --prompts TASK=runs/NAME/prompts/TASK
    curation.md           what was dropped and why, by category
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data.batches import seed_for
from data.common import write_atomic
from data.files import Prompt, is_open
from data.pictures import places
from harness import identity
from harness.ownership import FREE, LOCATED
from settings import Settings

REASONS = ("kept", "always good", "always bad", "not scored")
# Settings that change no score, and those of which only the content counts (`identity`).
NO_MATTER = ("threshold", "train_prompts", "config", *LOCATED)


def fingerprint(s: Settings, inputs: Mapping[str, str]) -> int:
    """A number for everything that the ranges depend on: samples, weights of the model, scorers and their weights.

    inputs: the identity of what the run reads, by flag; prompts are known one by one.
    """
    matters = {k: v for k, v in asdict(s).items() if k not in (*FREE, *NO_MATTER)}
    matters["inputs"] = {flag: value for flag, value in inputs.items() if not flag.startswith("--prompts")}
    return seed_for(json.dumps(matters, sort_keys=True))


class Ranges:
    """The lines that all ranks have written, also in earlier runs. This rank appends to its own file."""

    def __init__(self, folder: Path, rank: int, run: int):
        """run: the run's `fingerprint`; lines with another one are not ours."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file, self.run = folder, folder / f"rank-{rank}.jsonl", run
        self.known = self.all()

    def all(self) -> dict[tuple[str, str, str], dict]:
        """{`key` of a prompt: its line}, without a line that a kill has cut."""
        found = {}
        for file in sorted(self.folder.glob("rank-*.jsonl")):
            for line in file.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if entry["run"] == self.run:
                    found[entry["task"], entry["text"], entry.get("image", "")] = entry
        return found

    def has(self, prompt: Prompt) -> bool:
        return key(prompt) in self.known

    def add(self, prompts: Sequence[Prompt], scores_PG: np.ndarray) -> None:
        """Write the groups' scores, (P, G); nan is a sample that no scorer could judge."""
        with self.file.open("a") as stream:
            stream.write("\n" if self.file.stat().st_size else "")  # ends a line that a kill has cut short
            for prompt, scores in zip(prompts, scores_PG, strict=True):
                entry = dict(zip(("task", "text", "image"), key(prompt), strict=True), category=category(prompt))
                values = [None if np.isnan(v) else round(float(v), 6) for v in scores]
                stream.write(json.dumps({"run": self.run, **entry, "scores": values}) + "\n")


def key(prompt: Prompt) -> tuple[str, str, str]:
    """What makes two prompts one: task, text and, of an edit, a hash of each source, maybe the picture itself."""
    return prompt.task, prompt.text, " ".join(identity.picture(where)[:16] for where in places(prompt))


def category(prompt: Prompt) -> str:
    """What the report counts by: the metadata's category, else GenEval's tag, else the task."""
    return prompt.metadata.get("category") or prompt.metadata.get("tag") or prompt.task


def verdict(scores: Sequence[float | None], threshold: float, middle: float) -> str:
    """Q 4.2's rule for one group, one of `REASONS`. A dropped one is good if its mean is above `middle`, else bad."""
    there = [value for value in scores if value is not None]
    if len(there) < len(scores) or not there:
        return "not scored"
    if max(there) - min(there) > threshold:
        return "kept"
    return "always good" if sum(there) / len(there) > middle else "always bad"


def write(folder: Path, prompts: Mapping[str, Sequence[Prompt]], lines: Mapping, threshold: float) -> str:
    """Write the kept prompts, with their order and metadata, and the report -> the report's table as text.

    "Good" is above the mean of all scores of the task, because rewards have no common scale.
    """
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for task, some in prompts.items():
        found = {key(p): lines[key(p)]["scores"] for p in some if key(p) in lines}
        every = [value for scores in found.values() for value in scores if value is not None]
        middle, kept = (sum(every) / len(every) if every else 0.0), []
        for prompt in some:
            said = verdict(found.get(key(prompt), ()), threshold, middle)
            row = counts.setdefault((task, category(prompt)), dict.fromkeys(REASONS, 0))
            row[said] += 1
            kept += [prompt] if said == "kept" else []
        target = folder / "prompts" / task
        for old in target.glob("train*"):  # of another threshold, perhaps in the other format
            old.unlink()
        if kept:
            target.mkdir(parents=True, exist_ok=True)
            described = all("include" in p.metadata or is_open(task, p.metadata) for p in kept)
            entries = ({"tag": task, **p.metadata, "prompt": p.text} for p in kept)  # the fields of `data/files.py`
            text = "".join(line + "\n" for line in (map(json.dumps, entries) if described else (p.text for p in kept)))
            write_atomic(target / ("train_metadata.jsonl" if described else "train.txt"), text)
    table = ["| task | category | " + " | ".join(REASONS) + " |", "|---|---|" + "---:|" * len(REASONS)]
    table += [f"| {task} | {c} | " + " | ".join(map(str, row.values())) + " |" for (task, c), row in counts.items()]
    text = "\n".join(table)
    notes = f"Kept: a range of the reward above {threshold:g} within the prompt's group (Q 4.2)."
    write_atomic(folder / "curation.md", f"# Curation\n\n{notes}\n\n{text}\n")
    kept = sum(row["kept"] for row in counts.values())
    total = sum(sum(row.values()) for row in counts.values())
    return f"{text}\n\n{kept} of {total} prompts kept: {folder / 'prompts'}\nreport: {folder / 'curation.md'}"

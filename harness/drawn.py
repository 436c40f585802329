"""Test pictures on disk, one file each: drawn once, by all ranks together, and scored from there as often as wanted.

    pictures/MODEL-KEY/a-red-cat-5e6f7a8b9c0d-0.png     the first picture of a prompt by a model, eight bits a channel

KEY follows from the model's weights and from all settings that a picture depends on. So what was drawn with others is
never taken for it, and a command that was stopped goes on where it was.

The file's name follows from the prompt's words, its source pictures and the number of the picture. Its noise follows
from these and --seed: every model draws a prompt from the same noise, in whatever list the prompt stands, and a prompt
of two lists is drawn once.

A micro-batch is the same whoever draws it and whatever is there already, because rows that are computed in another
batch differ in their last bits. So a folder that two ranks have drawn has the bytes of one that was drawn by one.
A kill loses what is being drawn, one micro-batch a rank. A picture appears under its name when it is whole.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from data.batches import seed_for
from data.files import Prompt
from data.pictures import layout, places, sources_of, to_picture
from harness import identity, ranks, rollout
from models.flow import FlowModel
from settings import Settings

# What a picture depends on besides weights, prompt, guidance scale and noise.
SETTINGS = ("seed", "eval_steps", "resolution", "source_resolution", "text_length", "precision", "cfg_rescale")


class Picture(NamedTuple):
    """One picture of a test prompt: the prompt, its place among its task's, and which of its pictures it is."""

    prompt: Prompt
    task: str  # under which it is listed
    index: int
    sample: int

    @property
    def key(self) -> str:
        """What names the prompt: a hash of its words and its source pictures."""
        content = repr((self.prompt.text, *map(identity.picture, places(self.prompt))))
        return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:12]

    @property
    def file(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.text.lower()).strip("-")[:40]
        return f"{words or 'prompt'}-{self.key}-{self.sample}.png"

    def row(self, model: str, folder: Path, scores: Mapping[str, float]) -> dict:
        """What an evaluation says of it; see harness/suites.py. folder: of the model's pictures, in the run's."""
        meta = self.prompt.metadata
        return {
            "model": model, "prompt": self.prompt.text, "index": self.index, "sample": self.sample, "task": self.task,
            "tag": meta.get("tag") or self.task, "category": meta.get("category") or self.task,
            "picture": f"{folder.parent.name}/{folder.name}/{self.file}", "sources": [*places(self.prompt)],
            "scores": dict(scores),
        }  # fmt: skip


def listed(prompts: Mapping[str, Sequence[Prompt]], samples: int = 1) -> list[Picture]:
    """The pictures of some prompts by task: all first ones, then all second ones, and so on.

    A line that stands n times in its task's list is one prompt with n times as many pictures, as Flow-GRPO's copy of
    GenEval's test file says "four pictures" by four lines. Lines of the same words and other metadata are prompts of
    their own, of which the pictures are the same.
    """
    found = []
    for task, some in prompts.items():
        distinct: dict[tuple, int] = {}
        times: Counter[tuple] = Counter()
        for prompt in some:
            key = Picture(prompt, task, 0, 0).key, json.dumps(prompt.metadata, sort_keys=True)
            index = distinct.setdefault(key, len(distinct))
            found += [Picture(prompt, task, index, times[key] * samples + sample) for sample in range(samples)]
            times[key] += 1
    return sorted(found, key=lambda picture: picture.sample)


def folder_of(root: Path, name: str, s: Settings, cfg: float, weights: Sequence[str]) -> Path:
    """The folder of a model's pictures, made if it is new. All ranks call this. A model that was drawn under another
    name is not drawn again. weights: the identities of what it is made of (harness/identity.py)."""
    values = {key: getattr(s, key) for key in SETTINGS}
    key = hashlib.sha256(json.dumps([values, float(cfg), *weights]).encode()).hexdigest()[:12]
    named = re.sub(r"[^\w.-]+", "-", name)
    folder = next(root.glob(f"pictures/*-{key}"), root / "pictures" / f"{named}-{key}")
    ranks.wait()  # all have looked
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def draw(
    model: FlowModel, pictures: Sequence[Picture], s: Settings, cfg: float, is_there: Callable[[str], bool],
    keep: Callable[[str, Tensor], None], name: str = "",
) -> None:  # fmt: skip
    """Have the selected expert draw the pictures that are not there, and `keep` each by its file's name. Q Eq. 3.

    All ranks call this. They take turns at the micro-batches; the last turn is filled up with the last micro-batch
    again, because under FSDP every rank must run as many forwards as the others.
    """
    rank, world = ranks.rank_and_world()
    rows = {p.file: rollout.Row(p.prompt, seed_for("draw", s.seed, p.key, p.sample)) for p in pictures}
    names = {row.seed: file for file, row in rows.items()}
    wanted = []
    if not all(map(is_there, rows)):
        rollout.encode_all(model, (row.prompt for row in rows.values()), cfg != 1)
        kind = lambda row: (layout(row.prompt), model.tokens(row.prompt.text, sources_of(row.prompt)))  # noqa: E731
        parts = rollout.micro_batches(model, sorted(rows.values(), key=kind), s.micro_batch or 96)
        wanted = [part for part in parts if not all(is_there(names[row.seed]) for row in part)]
    ranks.wait()  # all have looked, and none has drawn
    mine = range(rank, -(-len(wanted) // world) * world, world)
    shown = [wanted[min(turn, len(wanted) - 1)] for turn in mine]
    bar = tqdm(shown, desc=f"drawing {name}", leave=False, delay=1, disable=rank > 0)
    for turn, part in zip(mine, bar, strict=True):
        images = model.decode(rollout.sampled(model, part, s.eval_steps, cfg))
        rollout.check_finite(model, "the VAE", images)
        for row, image in zip(part, images, strict=True) if turn < len(wanted) else ():
            if not is_there(names[row.seed]):
                keep(names[row.seed], image)
    ranks.wait()


def draw_to(
    folder: Path, model: FlowModel, pictures: Sequence[Picture], s: Settings, cfg: float, name: str, anew: bool = False
) -> None:
    """`draw` to the files of a folder; anew: also those that are there."""

    def keep(file: str, image: Tensor) -> None:
        hidden = folder / f".{file}"
        to_picture(image).save(hidden, "PNG")
        hidden.replace(folder / file)

    folder.mkdir(parents=True, exist_ok=True)
    draw(model, pictures, s, cfg, lambda file: not anew and is_whole(folder / file), keep, name)


def is_whole(file: Path) -> bool:
    """Is a PNG there to its last byte? After a power failure a file may be there and empty."""
    try:
        with file.open("rb") as stream:
            stream.seek(-12, 2)
            return stream.read()[4:8] == b"IEND"
    except OSError:
        return False


def by_prompts(pictures: Sequence[Picture], size: int) -> Iterator[tuple[str, list[Picture]]]:
    """(task, pictures): task by task, in parts of about `size` that hold all pictures of their prompts."""
    groups: dict[str, dict[int, list[Picture]]] = {}
    for p in pictures:
        groups.setdefault(p.task, {}).setdefault(p.index, []).append(p)
    for task, prompts in groups.items():
        part: list[Picture] = []
        for own in prompts.values():
            if part and len(part) + len(own) > size:
                yield task, part
                part = []
            part += sorted(own, key=lambda p: p.sample)
        yield task, part

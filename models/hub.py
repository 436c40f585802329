"""Where are a model's files, what do they hold, and are they whole?

    locate(where)          what a user writes (a folder, a file, a run, a Hub id) -> a folder
    kind(folder)           "peft", "diffusers" or "full": an adapter in either layout, or a whole transformer
    read_part, read_transformer  a part of a pipeline through diffusers or transformers, every weight checked
    fingerprint(folder)    a hash of the weights, by which an adapter knows its base

Nothing is ever unpickled, because a pickle runs its author's code.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import torch
import transformers
from diffusers import QwenImageTransformer2DModel, SD3Transformer2DModel, logging

from data.common import first_line

for library in (transformers.logging, logging):
    library.set_verbosity_error()  # CLIP reads 77 tokens of a long prompt, T5 the rest: no news for each of them
    library.disable_progress_bar()

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_FILES = (*PEFT_FILES, LORA_FILE)
# A transformer's own files, without half-precision copies. A teacher is an adapter or a transformer: both are fetched.
TRANSFORMER_FILES = tuple(
    f"transformer/{name}"
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
                 "diffusion_pytorch_model-0*.safetensors")
)  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# A Hub id: owner/name, maybe a folder inside, maybe @revision. Names may hold dots (SD3.5M-...), so a dot alone does
# not make a file, but these endings do.
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?P<inside>(/\w[\w.-]*)*)(@(?P<revision>[\w./-]+))?", re.ASCII)
FILE_ENDINGS = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".zip")
Transformer = SD3Transformer2DModel | QwenImageTransformer2DModel
TRANSFORMERS = {kind.__name__: kind for kind in (SD3Transformer2DModel, QwenImageTransformer2DModel)}


class ModelError(ValueError):
    """A checkpoint or adapter that cannot be used; the message is one line that names the file and the fault."""


# ------------------------------------------------------------------------------------------------------ locations
def locate(where: str | Path, patterns: Sequence[str] = (*ADAPTER_FILES, *TRANSFORMER_FILES)) -> Path:
    """The folder that a user means by a model, teacher, anchor or init; the Hub's files are fetched to its cache.

    A folder is itself, a run's folder stands for its last checkpoint, an adapter's weight file for its folder.
    What is no path (see `hub_id`) is a Hub id, `owner/name[/folder][@revision]`. Of it, only files that match
    `patterns` (relative to the folder) and are no pickles are fetched. ModelError, one line that says what to do.
    """
    where = str(where)
    path = Path(os.path.expanduser(where))
    if path.is_file():
        if path.name not in ADAPTER_FILES:
            raise ModelError(f"{path}: neither a folder nor one of {', '.join(ADAPTER_FILES)}; give its folder")
        return path.parent
    if where and path.is_dir():
        return last_checkpoint(path) or path
    if not hub_id(where):
        raise ModelError(f"{where or repr(where)}: no such file or folder; give a path or a Hub id owner/name")
    return _download(where, patterns)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None. One that is being written has a hidden name."""
    return next(reversed(checkpoints_in(folder)), None)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run folder in the order of their steps: folders `step-<digits>`, and nothing else."""
    found = (p for p in (Path(folder) / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name))
    return sorted((p for p in found if p.is_dir()), key=lambda p: int(p.name[5:]))


def hub_id(text: str) -> str:
    """The `owner/name` that a text names on the Hub; "" if it is a path, or can be neither."""
    match = HUB_ID.fullmatch(text)
    if match is None or Path(text).suffix in FILE_ENDINGS or Path(Path(text).parts[0]).exists():
        return ""
    return match["repo"]


def base_and_revision(source: str) -> tuple[str, str]:
    """A base as libraries want it: a Hub id without its revision, and the revision; a path stays whole."""
    name, _, revision = source.partition("@") if hub_id(source) else (source, "", "")
    return name, revision


def _download(where: str, patterns: Sequence[str]) -> Path:
    match = HUB_ID.fullmatch(where)
    repo, inside = match["repo"], match["inside"].strip("/")
    wanted = [f"{inside}/{pattern}" if inside else pattern for pattern in patterns]
    try:
        options = {"allow_patterns": wanted, "ignore_patterns": list(PICKLES)}
        root = huggingface_hub.snapshot_download(repo, revision=match["revision"], **options)
    except Exception as fault:  # not there, gated, no network, a full disk: the library's own words, on one line
        reason = " ".join(str(fault).split()) or type(fault).__name__
        raise ModelError(f"{where}: no such path here, and not fetched from the Hub ({reason})") from fault
    folder = Path(root, inside)
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        raise ModelError(f"{where}: holds none of {', '.join(patterns)}; name the folder inside, {repo}/FOLDER")
    return folder


def kind(folder: Path) -> str:
    """What a folder holds: "peft" (preferred if both are there), "diffusers", or "full", a whole transformer."""
    folder = Path(folder)
    found = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    if set(PEFT_FILES) <= set(found):
        return "peft"
    if LORA_FILE in found:
        return "diffusers"
    file = folder / "config.json"
    named = str(read_json(file).get("_class_name", "")) if file.is_file() else ""
    if (folder / "transformer" / "config.json").is_file() or named.endswith("Transformer2DModel"):
        return "full"
    raise ModelError(
        f"{folder}: neither an adapter nor a model in safetensors; expected {' and '.join(PEFT_FILES)} (PEFT), "
        f"{LORA_FILE} (diffusers) or transformer/config.json (a full checkpoint)"
    )


@contextmanager
def reading(where: Path, what: str) -> Iterator[None]:
    """Whatever is raised inside becomes a ModelError of one line: of a broken file, libraries raise what they like."""
    try:
        yield
    except Exception as fault:
        raise ModelError(f"{where}: not readable as {what} ({first_line(fault)})") from fault


def read_json(file: Path) -> dict:
    """A JSON object, or ModelError."""
    with reading(file, "a JSON object"):
        return dict(json.loads(file.read_text(encoding="utf-8")))


def fingerprint(folder: Path) -> str:
    """A hash of the weights in `folder`: whole small files, the first and last 8 MB of large ones."""
    digest, edge = sha256(), 8 << 20
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(stream.read(edge))
            if file.stat().st_size > edge:
                stream.seek(max(edge, file.stat().st_size - edge))
                digest.update(stream.read())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------- parts
def require_parts(folder: Path, parts: Iterable[str]) -> None:
    """ModelError if a pipeline's folder lacks one of these folders."""
    for part in parts:
        if not (folder / part).is_dir():
            raise ModelError(f"{folder / part}: missing; the base must be a pipeline in diffusers' layout")


def read_part(kind: type, folder: Path, dtype: torch.dtype | None = None):
    """`kind.from_pretrained(folder)`, frozen if it has weights (then with a `dtype`), or a ModelError of one line."""
    require_parts(folder.parent, [folder.name])
    with reading(folder, kind.__name__):
        return kind.from_pretrained(folder) if dtype is None else read_weights(kind, folder, dtype)


def read_transformer(folder: Path, dtype: torch.dtype, like: dict | None = None) -> Transformer:
    """`folder/transformer` (or `folder` itself) in diffusers' layout, frozen, on the CPU.

    ModelError names the folder if it cannot be read, or the entry in which its config differs from `like`.
    """
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = read_json(folder / "config.json")
    like = json.loads(json.dumps(dict(like or {}), default=str))  # a file's lists are a new model's tuples
    for key, ours in like.items():
        if key in config and config[key] != ours and (key[0] != "_" or key == "_class_name") and key != "sample_size":
            raise ModelError(f"{folder / 'config.json'}: another architecture: {key} is {config[key]}, not {ours}")
    with reading(folder, "a transformer"):
        kind = TRANSFORMERS[config.get("_class_name", SD3Transformer2DModel.__name__)]
        return read_weights(kind, folder, dtype, strict=True)


def read_weights(kind: type, folder: Path, dtype: torch.dtype, strict: bool = False):
    """A module from its own library, frozen. ValueError if its file lacks a tensor, or has one too many if `strict`."""
    # low_cpu_mem_usage stays at its default: weights go straight from the file into place
    options = {"torch_dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    module, found = kind.from_pretrained(folder, **options)
    # The libraries only warn of these, and what is missing is random or empty. The T5 encoder shares its embeddings
    # between two names, and the file may hold one of them.
    amiss = [key for key in found["missing_keys"] if key != "encoder.embed_tokens.weight"]
    if amiss := sorted([*amiss, *(found["unexpected_keys"] if strict else [])]):
        raise ValueError(f"its weights are not those that its config describes: {amiss[0]}")
    return module.requires_grad_(False).eval()

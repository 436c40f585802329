"""Where are a model's files, what do they hold, and are they whole?

    locate(where)          what a user writes (a folder, a file, a run, a Hub id) -> a folder
    kind(place)            "peft", "file" or "full": PEFT's folder, a LoRA in one file, or a whole transformer
    read_part, read_transformer  a part of a pipeline through diffusers or transformers, every weight checked
    fingerprint(folder)    a hash of the weights, by which an adapter knows its base

Nothing is ever unpickled, because a pickle runs its author's code.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import torch
import transformers
from diffusers import QwenImage21Transformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel, logging
from huggingface_hub.errors import DryRunError
from safetensors import safe_open

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
# A Hub id: owner/name, maybe a folder or a LoRA inside, maybe @revision. Names may hold dots (SD3.5M-...), so a dot
# alone does not make a file, but these endings do.
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?P<inside>(/\w[\w.-]*)*)(@(?P<revision>[\w./-]+))?", re.ASCII)
FILE_ENDINGS = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".zip")
Transformer = SD3Transformer2DModel | QwenImageTransformer2DModel | QwenImage21Transformer2DModel
TRANSFORMERS = {kind.__name__: kind for kind in Transformer.__args__}


class ModelError(ValueError):
    """A checkpoint or adapter that cannot be used; the message is one line that names the file and the fault."""


# ------------------------------------------------------------------------------------------------------ locations
def locate(where: str | Path, patterns: Sequence[str] = (*ADAPTER_FILES, *TRANSFORMER_FILES)) -> Path:
    """The folder that a user means by a model, teacher, anchor or init; the Hub's files are fetched to its cache.

    A folder is itself, a run's folder stands for its last checkpoint, an adapter's file of a known name for its folder.
    Where an adapter may be, a .safetensors file of another name is itself.
    What is no path (see `hub_id`) is a Hub id, `owner/name[/folder][/file.safetensors][@revision]`. Of it, only files
    that match `patterns` (relative to the folder) and are no pickles are fetched, or if there are none and an adapter
    may be there, its only .safetensors file. ModelError, one line that says what to do.
    """
    where = str(where)
    path = Path(os.path.expanduser(where))
    if path.is_file():
        if path.name in ADAPTER_FILES:
            return path.parent
        if path.suffix == ".safetensors" and LORA_FILE in patterns:
            return path
        raise _not_a_folder(path)
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
    match, suffix = HUB_ID.fullmatch(text), Path(text).suffix
    if match is None or Path(Path(text).parts[0]).exists():
        return ""
    if suffix in FILE_ENDINGS and not (suffix == ".safetensors" and match["inside"]):
        return ""
    return match["repo"]


def base_and_revision(source: str) -> tuple[str, str]:
    """A base as libraries want it: a Hub id without its revision, and the revision; a path stays whole."""
    name, _, revision = source.partition("@") if hub_id(source) else (source, "", "")
    return name, revision


def _download(where: str, patterns: Sequence[str]) -> Path:
    match = HUB_ID.fullmatch(where)
    repo, inside = match["repo"], Path(match["inside"].strip("/"))
    file = inside.name if inside.suffix == ".safetensors" else ""  # one LoRA of several
    inside = inside.parent if file else inside

    def fetch(patterns: Sequence[str], ignored: Sequence[str] = (), **more):
        wanted, unwanted = ([(inside / pattern).as_posix() for pattern in some] for some in (patterns, ignored))
        options = {"allow_patterns": wanted, "ignore_patterns": [*PICKLES, *unwanted], **more}
        try:
            return huggingface_hub.snapshot_download(repo, revision=match["revision"], **options)
        except DryRunError:
            return []
        except Exception as fault:  # not there, gated, no network, a full disk: the library's own words, on one line
            reason = " ".join(str(fault).split()) or type(fault).__name__
            raise ModelError(f"{where}: no such path here, and not fetched from the Hub ({reason})") from fault

    patterns = [file] if file else patterns
    folder = Path(fetch(patterns), inside)
    if LORA_FILE in patterns and not any(any(folder.glob(pattern)) for pattern in patterns):  # a LoRA of another name
        patterns = [*patterns, "*.safetensors"]
        names = [found.filename for found in fetch(patterns[-1:], ["*/*"], dry_run=True)]
        if len(names) > 1:
            raise ModelError(f"{where}: holds {len(names)} safetensors files; give one of them, as {repo}/{names[-1]}")
        fetch(patterns[-1:], ["*/*"])
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        raise ModelError(f"{where}: holds none of {', '.join(patterns)}; name what is inside, {repo}/FOLDER_OR_FILE")
    return folder / file


def kind(place: Path) -> str:
    """What is there: "peft" (preferred if several are there), "file", a LoRA in one file, or "full", a transformer."""
    place = Path(place)
    if all((place / name).is_file() for name in PEFT_FILES):
        return "peft"
    if (place / LORA_FILE).is_file():
        return "file"
    file = place / "config.json"
    named = str(read_json(file).get("_class_name", "")) if file.is_file() else ""
    if (place / "transformer" / "config.json").is_file() or named.endswith("Transformer2DModel"):
        return "full"
    if not any("lora" in key for key in _keys(lora_file(place))):
        raise _not_a_folder(lora_file(place))
    return "file"


def lora_file(place: Path) -> Path:
    """The file of a LoRA in one file: `place` itself, or diffusers' name in it, or its only .safetensors file."""
    if place.is_file() or (place / LORA_FILE).is_file():
        return place if place.is_file() else place / LORA_FILE
    found = sorted(file for file in place.glob("[!.]*.safetensors") if file.name not in PEFT_FILES)
    if len(found) > 1:
        raise ModelError(f"{place}: holds {len(found)} safetensors files; give one of them, as {found[-1]}")
    if not found or (place / "config.json").is_file():
        raise ModelError(
            f"{place}: neither an adapter nor a model in safetensors; expected {' and '.join(PEFT_FILES)} (PEFT), "
            f"{LORA_FILE} or one other .safetensors file (a LoRA), or transformer/config.json (a full checkpoint)"
        )
    return found[0]


def _keys(file: Path) -> list[str]:
    """The names of a file's tensors, from its header."""
    with reading(file, "safetensors"), safe_open(file, "pt") as opened:
        return list(opened.keys())


def _not_a_folder(file: Path) -> ModelError:
    """Of a file that is no adapter: with the command that makes a folder of it, if it is a single-file checkpoint."""
    keys = " ".join(_keys(file)) if file.suffix == ".safetensors" else ""
    made = "StableDiffusion3Pipeline" if "joint_blocks." in keys else "QwenImageTransformer2DModel"
    if "joint_blocks." not in keys and ".img_mod." not in keys or "lora" in keys:
        return ModelError(f"{file}: neither a folder nor a LoRA in safetensors, as {', '.join(ADAPTER_FILES)}")
    into = str(file.with_suffix("") if made.endswith("Pipeline") else file.with_suffix("") / "transformer")
    command = f"from diffusers import {made} as M; M.from_single_file({str(file)!r}).save_pretrained({into!r})"
    return ModelError(f'{file}: a single-file checkpoint; make a folder of it: python -c "{command}"')


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


def transformer_in(folder: Path) -> Path:
    """The folder of a transformer in diffusers' layout: `transformer` in `folder`, or `folder` itself."""
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def transformer_config(folder: Path, like: Mapping | None = None) -> dict:
    """The config of the transformer in a folder. ModelError if it is no such, or has an entry other than in `like`."""
    file = transformer_in(folder) / "config.json"
    config = {"_class_name": SD3Transformer2DModel.__name__, **read_json(file)}
    like = json.loads(json.dumps(dict(like or {}), default=str))  # a file's lists are a new model's tuples
    for key, ours in like.items():
        if key in config and config[key] != ours and (key[0] != "_" or key == "_class_name") and key != "sample_size":
            raise ModelError(f"{file}: another architecture: {key} is {config[key]}, not {ours}")
    if config["_class_name"] not in TRANSFORMERS:
        raise ModelError(f"{file}: a {config['_class_name']}; the known transformers are {', '.join(TRANSFORMERS)}")
    return config


def read_transformer(folder: Path, dtype: torch.dtype, like: Mapping | None = None) -> Transformer:
    """The transformer in a folder, frozen, on the CPU. ModelError if it cannot be read, and as `transformer_config`."""
    kind, folder = TRANSFORMERS[transformer_config(folder, like)["_class_name"]], transformer_in(folder)
    with reading(folder, "a transformer"):
        return read_weights(kind, folder, dtype, strict=True)


def empty_transformer(config: Mapping) -> Transformer:
    """The transformer that a config describes, on torch's meta device: it has shapes and no numbers."""
    with torch.device("meta"):
        return TRANSFORMERS[config["_class_name"]].from_config(config).requires_grad_(False)


def read_weights(kind: type, folder: Path, dtype: torch.dtype, strict: bool = False):
    """A module from its own library, frozen. ValueError if its file lacks a tensor, or has one too many if `strict`."""
    files = [file.name for file in folder.glob("*.safetensors")]
    if files and all(".fp16" in name for name in files):
        whole = (folder.parent / "model_index.json").is_file()
        made, place = ("DiffusionPipeline", folder.parent) if whole else (kind.__name__, folder)
        module = "diffusers" if whole else kind.__module__.partition(".")[0]
        command = f"from {module} import {made} as M; M.from_pretrained({str(place)!r}, variant='fp16')"
        command += f".save_pretrained({f'{place}-full'!r})"
        raise ValueError(f'it holds fp16 copies only; write the usual files: python -c "{command}"')
    # low_cpu_mem_usage stays at its default: weights go straight from the file into place
    options = {"torch_dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    module, found = kind.from_pretrained(folder, **options)
    # The libraries only warn of these, and what is missing is random or empty. The T5 encoder shares its embeddings
    # between two names, and the file may hold one of them.
    amiss = [key for key in found["missing_keys"] if key != "encoder.embed_tokens.weight"]
    if amiss := sorted([*amiss, *(found["unexpected_keys"] if strict else [])]):
        raise ValueError(f"its weights are not those that its config describes: {amiss[0]}")
    return module.requires_grad_(False).eval()

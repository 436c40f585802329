"""How does a LoRA travel between this project, PEFT and stock diffusers without losing its scale?

A LoRA is two factors a module, A (r, in) and B (out, r), and one number that is in neither: the update of a weight is
alpha / r * B @ A. A reader that loses alpha takes r for it, and the pictures are silently wrong by a factor. Layouts:

    PEFT        adapter_config.json (r, lora_alpha, targets) and adapter_model.safetensors,
                keys `base_model.model.MODULE.lora_A.weight`. What public teachers come in.
    diffusers   pytorch_lora_weights.safetensors, keys `transformer.MODULE.lora_A.weight`; alpha stands in the file's
                metadata, as the JSON text "lora_adapter_metadata", or nowhere. What `load_lora_weights` reads.

`save_adapter` writes both, `read_adapter` reads either and refuses what it would read wrongly. `locate` turns what a
user may write (a folder, a file, a run, a Hub id) into a folder, `kind` says what is in it, and `model_card` says in
words how it was made and how it is loaded. Nothing is ever unpickled: a pickle runs its author's code.
"""

import copy
import html
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import safetensors.torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn

from data.common import first_line

# Every projection of SD3's (and Qwen-Image's) joint attention, as Flow-GRPO publishes its LoRAs. PEFT matches whole
# dotted endings, so `attn.` keeps out `attn2`, the second attention of SD3.5's first blocks, which Flow-GRPO leaves be.
TARGETS = tuple(
    f"attn.{layer}"
    for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
PREFIX = "base_model.model."  # what PEFT puts before every module name in its files
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_FILES = (*PEFT_FILES, LORA_FILE)
# A transformer's own files, without half-precision copies; a teacher may be either, and is asked for as both.
TRANSFORMER_FILES = tuple(
    f"transformer/{name}"
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
                 "diffusion_pytorch_model-0*.safetensors")
)  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# A Hub id: owner/name, maybe a folder inside, maybe @revision. Names may hold dots (SD3.5M-...), so that a dot alone
# does not make a file: these endings do.
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?P<inside>(/\w[\w.-]*)*)(@(?P<revision>[\w./-]+))?", re.ASCII)
FILE_ENDINGS = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".zip")
FACTOR = re.compile(r"(?P<module>.+)\.(?P<factor>lora_[AB])(\.default)?\.weight")  # older PEFT: `lora_A.default.weight`
# What changes the function of an adapter beyond alpha / r * B @ A, or which weights it adds to.
UNREADABLE = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication", "target_parameters",
    "trainable_token_indices", "arrow_config", "alora_invocation_tokens", "kasa_config", "monteclora_config",
    "velora_config", "megatron_config",
)  # fmt: skip
# Other initialisations (pissa, olora, corda, loftq ...) move the base's own weights too, which no adapter file holds.
HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


class ModelError(ValueError):
    """A checkpoint or adapter that cannot be used; the message is one line that names the file and the fault."""


def lora_config(rank: int, alpha: float, targets: Sequence[str] = TARGETS) -> LoraConfig:
    """Flow-GRPO's LoRA: gaussian A, zero B, update (alpha / rank) * B @ A on every module that ends in a target."""
    return LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))


# ------------------------------------------------------------------------------------------------- finding them
def locate(where: str, patterns: Sequence[str] = (*ADAPTER_FILES, *TRANSFORMER_FILES)) -> Path:
    """The folder that a user means by a model, teacher, anchor or init; the Hub's files are fetched to its cache.

    A folder is itself; a run's folder stands for its last checkpoint; an adapter's weight file for its folder.
    What is no path is a Hub id, `owner/name[/folder][@revision]`, of which only files that match `patterns`
    (relative to the folder) and are no pickles are fetched. HF_HUB_OFFLINE is respected: the cache alone is asked.
    What starts with . / ~, has a file's ending, or begins with a folder that exists is a path, and a missing one is
    never looked for on the Hub. Raises ModelError, one line that says what to do.
    """
    where = str(where)
    path = Path(where).expanduser()
    if path.is_file():
        if path.name not in ADAPTER_FILES:
            raise ModelError(f"{path}: neither a folder nor one of {', '.join(ADAPTER_FILES)}; give its folder")
        return path.parent
    if where and path.is_dir():
        last = last_checkpoint(path)
        names = {entry.name for entry in path.iterdir()}
        if last is None and "checkpoints" in names and not names & {*ADAPTER_FILES, "transformer"}:
            raise ModelError(f"{path}: the run has no complete checkpoint yet; let it run on, or give another folder")
        return last or path
    if not hub_id(where):
        raise ModelError(f"{where or repr(where)}: no such file or folder; give a path or a Hub id owner/name")
    return _download(where, patterns)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None. One that is being written has a hidden name."""
    found = (p for p in (Path(folder) / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name))
    return max(found, key=lambda p: int(p.name[5:]), default=None)


def hub_id(text: str) -> str:
    """The `owner/name` that a text names on the Hub; "" where it is a path, or could be neither."""
    match = HUB_ID.fullmatch(text)
    if match is None or Path(text).suffix in FILE_ENDINGS or Path(Path(text).parts[0]).exists():
        return ""
    return match["repo"]


def _base_and_revision(source: str) -> tuple[str, str]:
    """A base as libraries want it: a Hub id without its revision, and the revision; a path stays whole."""
    name, _, revision = source.partition("@") if hub_id(source) else (source, "", "")
    return name, revision


def _download(where: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download  # half a second that local paths need not pay

    match = HUB_ID.fullmatch(where)
    repo, inside, revision = match["repo"], match["inside"].strip("/"), match["revision"]
    wanted = [f"{inside}/{pattern}" if inside else pattern for pattern in patterns]
    try:
        root = snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=list(PICKLES))
    except errors.GatedRepoError as fault:
        page = f"{constants.ENDPOINT}/{repo}"
        raise ModelError(f"{where}: gated; accept its licence at {page}, then log in with `hf auth login`") from fault
    except errors.RevisionNotFoundError as fault:
        raise ModelError(f"{where}: no revision {revision or 'main'} there; give another one after the @") from fault
    except errors.RepositoryNotFoundError as fault:
        raise ModelError(
            f"{where}: neither a path here nor a public Hub repository; check the spelling, or log in with `hf auth "
            "login` if it is private"
        ) from fault
    except Exception as fault:  # no network, HF_HUB_OFFLINE, the Hub's own errors, a full disk
        offline = isinstance(fault, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled))
        reason = "no connection, or HF_HUB_OFFLINE is set, and the cache lacks it" if offline else first_line(fault)
        raise ModelError(
            f"{where}: no such path here, and the Hub gave nothing ({reason}); download it where there is a network "
            f"(`hf download {repo}`) and give the folder's path"
        ) from fault
    folder = Path(root, inside)
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        hint = f"name the folder inside, {repo}/FOLDER"
        raise ModelError(f"{where}: holds none of {', '.join(patterns)}; {hint}")
    return folder


def kind(folder: Path) -> str:
    """What a folder holds: "peft" (preferred where both adapters are), "diffusers", or "full", a whole transformer.

    Raises ModelError where it holds none of them, or half of one.
    """
    folder = Path(folder)
    found = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    if set(PEFT_FILES) <= set(found):
        return "peft"
    if LORA_FILE in found:
        return "diffusers"
    if (folder / "transformer" / "config.json").is_file() or _is_transformer(folder / "config.json"):
        return "full"
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: its weights are pickles ({', '.join(pickles)}), refused because unpickling runs code; "
            "have them saved as safetensors"
        )
    if found:
        missing = next(name for name in PEFT_FILES if name not in found)
        raise ModelError(f"{folder / missing}: missing beside {found[0]}; an adapter in PEFT's layout needs both")
    raise ModelError(
        f"{folder}: neither an adapter nor a model; expected {' and '.join(PEFT_FILES)} (PEFT), "
        f"{LORA_FILE} (diffusers) or transformer/config.json (a full checkpoint)"
    )


def _is_transformer(file: Path) -> bool:
    return file.is_file() and str(_json(file).get("_class_name", "")).endswith("Transformer2DModel")


# ---------------------------------------------------------------------------------------------------- reading
def read_adapter(
    folder: Path, modules: Mapping[str, nn.Module], source: str, fingerprint: str = ""
) -> tuple[dict[str, Tensor], LoraConfig]:
    """An adapter in either layout, checked against a model: ({MODULE.lora_A.weight: (r, in), ...}, config), float32.

    `modules` are the named modules of its transformer, `source` and `fingerprint` its name and the hash of its
    weights. The config says what the factors need, r, alpha and targets, and nothing else: a dropout or an
    initialisation belongs to the training that is over. A diffusers file that does not tell alpha is read as stock
    diffusers reads it, alpha = r, with one line on stderr.

    Raises ModelError, one line naming the file, for an unreadable file, an adapter of another base, a module the
    model lacks, factors that do not fit, lack their partner or are not finite, and for variants of LoRA whose update
    is not alpha / r * B @ A with one alpha and r for all modules.
    """
    folder = Path(folder)
    layout = kind(folder)
    if layout == "full":
        raise ModelError(f"{folder}: a full checkpoint, and an adapter is needed here; give a LoRA's folder")
    file = folder / (PEFT_FILES[1] if layout == "peft" else LORA_FILE)
    tensors, metadata = _read_tensors(file)
    if layout == "peft":
        described = folder / PEFT_FILES[0]
        config, alphas, prefix = _json(described), {}, PREFIX
    else:
        described, prefix = file, "transformer."
        config = _diffusers_config(file, metadata)
        alphas = {
            key: tensors.pop(key).item() for key in [*tensors] if key.endswith(".alpha") and tensors[key].numel() == 1
        }
    _refuse_variants(described, config or {})
    state = _factors(file, tensors, prefix, optional=layout == "peft")
    if config is None:
        config = {"lora_alpha": _alpha_without_config(file, state, alphas)}
    elif alphas:
        raise ModelError(f"{file}: tells alpha twice, in its metadata and in {next(iter(alphas))}; remove one of them")
    _check_base(file, config, metadata.get("base", ""), source, fingerprint)
    rank, alpha = _scale(described, config, state)
    _check_factors(file, state, rank, modules, source)
    return state, lora_config(rank, alpha, _targets(config, state, modules))


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except Exception as fault:
        raise ModelError(f"{file}: not a readable safetensors file ({first_line(fault)}); fetch it again") from fault


def _diffusers_config(file: Path, metadata: Mapping[str, str]) -> dict | None:
    """The transformer's part of a diffusers file's LoRA metadata; None where the file has none."""
    if "lora_adapter_metadata" not in metadata:
        return None
    try:
        entries = json.loads(metadata["lora_adapter_metadata"]).items()
    except (ValueError, AttributeError) as fault:
        raise ModelError(f"{file}: its lora_adapter_metadata is not a JSON object; save the LoRA anew") from fault
    return {key.removeprefix("transformer."): value for key, value in entries if key.startswith("transformer.")}


def _factors(file: Path, tensors: Mapping[str, Tensor], prefix: str, optional: bool) -> dict[str, Tensor]:
    """The tensors of a file under the project's names, MODULE.lora_A.weight."""
    state = {}
    for key, value in tensors.items():
        match = FACTOR.fullmatch(key.removeprefix(prefix))
        if match is None or not (optional or key.startswith(prefix)):
            expected = f"{'' if optional else prefix}MODULE.lora_A.weight or lora_B"
            raise ModelError(f"{file}: {key} is no plain LoRA factor of a transformer ({expected}); it cannot be read")
        state[f"{match['module']}.{match['factor']}.weight"] = value.float()
    if not state:
        raise ModelError(f"{file}: holds no tensor at all; save the adapter again")
    for key in state:
        partner = key.replace(".lora_A.", ".lora_B.") if ".lora_A." in key else key.replace(".lora_B.", ".lora_A.")
        if partner not in state:
            raise ModelError(f"{file}: {key} has no partner {partner}; the file is incomplete, fetch it again")
    return state


def _alpha_without_config(file: Path, state: Mapping[str, Tensor], alphas: Mapping[str, float]) -> float:
    """The alpha of a diffusers file without metadata: its `MODULE.alpha` entries, else r, as stock diffusers has it."""
    modules = {key.rpartition(".lora_")[0] for key in state}
    if alphas:
        told = {key.removeprefix("transformer.").removesuffix(".alpha") for key in alphas}
        if told != modules or len(set(alphas.values())) > 1:
            raise ModelError(f"{file}: its .alpha entries differ or are not one a module; one alpha for all is needed")
        return next(iter(alphas.values()))
    rank = _rank(state)
    _warn_once(f"{file}: does not tell its alpha; read as {rank}, its rank, which is what stock diffusers does")
    return rank


def _refuse_variants(file: Path, config: Mapping) -> None:
    """ModelError for a config whose update is not alpha / r * B @ A on the modules that the tensors name."""
    wrong = [name for name in UNREADABLE if config.get(name)]
    for name, own in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or any(value != config.get(own) for value in pattern.values()):
            wrong.append(name)
    wrong += ["bias"] if config.get("bias", "none") != "none" else []
    wrong += ["init_lora_weights"] if config.get("init_lora_weights") not in HARMLESS_INITS else []
    if config.get("peft_type", "LORA") != "LORA":
        wrong = ["peft_type"]
    if wrong:
        value = f"{wrong[0]} = {_flat(config[wrong[0]])[:80]}"
        raise ModelError(f"{file}: {value} is not supported; only a plain LoRA, alpha / r * B @ A, can be read")


def _check_base(file: Path, config: Mapping, base: str, source: str, fingerprint: str) -> None:
    """ModelError where the adapter was trained on other weights; the shapes of two bases of one kind agree."""
    if base and fingerprint:
        if base != fingerprint:
            raise ModelError(f"{file}: trained on another base ({base}) than {source} ({fingerprint})")
        return  # the same weights, whatever they are called
    named, own = hub_id(str(config.get("base_model_name_or_path") or "")), hub_id(source)
    if named and own and named.lower() != own.lower():
        raise ModelError(
            f"{file}: trained on another base ({named}) than {own}; give that one as the model, or correct "
            "base_model_name_or_path beside it if they are the same"
        )


def _scale(file: Path, config: Mapping, state: Mapping[str, Tensor]) -> tuple[int, float]:
    """(r, alpha) such that alpha / r is the adapter's scale."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    rank = _rank(state) if rank is None else rank
    if type(rank) is not int or rank < 1:
        raise ModelError(f"{file}: r is {_flat(rank)}; it must be a positive whole number")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ModelError(f"{file}: lora_alpha is {_flat(alpha)}; it must be a finite number, there is no scale else")
    # Rank-stabilised LoRA divides by sqrt(r): the same update as a plain LoRA of alpha * sqrt(r).
    return rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _rank(state: Mapping[str, Tensor]) -> int:
    return next(value.shape[0] if value.ndim else 0 for key, value in state.items() if ".lora_A." in key)


def _check_factors(file: Path, state: Mapping, rank: int, modules: Mapping[str, nn.Module], source: str) -> None:
    for key, value in state.items():
        name, _, factor = key.removesuffix(".weight").rpartition(".")
        layer = modules.get(name)
        if not hasattr(layer, "in_features"):
            raise ModelError(f"{file}: adapts {name}, which is no linear layer of {source}; is it for another model?")
        needed = (rank, layer.in_features) if factor == "lora_A" else (layer.out_features, rank)
        if tuple(value.shape) != needed:
            shape = tuple(value.shape)
            raise ModelError(f"{file}: {key} is {shape}, and an adapter of rank {rank} for {source} needs {needed}")
        if not value.isfinite().all():
            raise ModelError(f"{file}: {key} holds values that are not finite; the adapter is broken, use another one")


def _targets(config: Mapping, state: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> list[str]:
    """Target names that select exactly the modules that have factors: the config's own, or else their full names."""
    adapted = {key.rpartition(".lora_")[0] for key in state}
    own = config.get("target_modules")
    own = tuple(own) if isinstance(own, list) else ()
    selected = {name for name in modules if name in own or name.endswith(tuple(f".{target}" for target in own))}
    return sorted(own if selected == adapted else adapted)


@cache
def _warn_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise ModelError(f"{file}: not readable as JSON ({first_line(fault)}); fetch it again") from fault
    if not isinstance(value, dict):
        raise ModelError(f"{file}: must hold one JSON object; fetch it again")
    return value


# ---------------------------------------------------------------------------------------------------- writing
def save_adapter(
    folder: Path, state: Mapping[str, Tensor], config: LoraConfig, source: str = "", fingerprint: str = "",
    pipeline: str = "",
) -> None:  # fmt: skip
    """Write an adapter in PEFT's layout and, where `pipeline` is a diffusers pipeline with LoRAs, in diffusers' too.

    `state` holds {MODULE.lora_A.weight: (r, in), ...}; the files hold float32. `source` is the base as the user names
    it; `fingerprint`, the hash of its weights, lets `read_adapter` refuse the adapter on another base. The config
    stays as it was. Not atomic: a run renames the whole checkpoint when it is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(config)
    name, revision = _base_and_revision(source)
    config.base_model_name_or_path, config.revision = name or None, revision or None
    described = config.to_dict()
    if isinstance(described["target_modules"], set):  # a set's order changes from process to process
        described["target_modules"] = sorted(described["target_modules"])
    (folder / PEFT_FILES[0]).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    state = {key: value.detach().float().cpu().contiguous() for key, value in state.items()}
    tensors = {PREFIX + key: value for key, value in state.items()}
    safetensors.torch.save_file(tensors, folder / PEFT_FILES[1], metadata={"format": "pt", "base": fingerprint})
    if pipeline:
        import diffusers

        save = getattr(getattr(diffusers, pipeline, None), "save_lora_weights", None)
        if save is not None:
            # Without the metadata, stock `load_lora_weights` takes r for alpha and draws other pictures.
            save(folder, transformer_lora_layers=state, transformer_lora_adapter_metadata=described)


# ----------------------------------------------------------------------------------------------------- the card
def model_card(settings: Mapping, metrics: Mapping, scores: Mapping, step: int, pipeline: str = "") -> str:
    """README.md of a checkpoint's folder, an adapter's or a whole transformer's, with the front matter for the Hub.

    `settings` are the run's resolved settings, `metrics` the last line of metrics.jsonl, `scores` {name: number} of the
    last evaluation; `pipeline` is the diffusers class that loads the adapter, "" where there is none. Any strings will
    do: they are escaped. A base that is a local path is left out of the front matter, which the Hub would refuse.
    """
    base, stage = str(settings.get("model", "")), str(settings.get("stage", ""))
    front = [f"base_model: {json.dumps(hub_id(base))}"] if hub_id(base) else []
    edits = "Edit" in pipeline  # Qwen-Image's editing pipelines, whose models draw too
    front += ["library_name: diffusers", f"pipeline_tag: {'image' if edits else 'text'}-to-image", "tags:"]
    whole = _is_whole(settings)
    does = ("image-to-image", "text-to-image") if edits else ("text-to-image",)
    tags = (*(() if whole else ("lora", "peft")), *does, "flow-matching", "reinforcement-learning")
    front += [f"- {tag}" for tag in tags]
    what = "A whole transformer." if whole else "A LoRA adapter; its update is `alpha / r * B @ A`."
    trained = f"Stage {_cell(stage)}, {int(step)} steps, on {_cell(base)}."
    if stage == "opd":
        trained += f" On-policy distillation with the estimator {_cell(settings.get('estimator', ''))}."
    teachers = [f"- {_cell(task)}: {_cell(name)}" for task, name in dict(settings.get("teachers") or {}).items()]
    parts = [
        "---", *front, "---", "", f"# {_cell(settings.get('name') or 'LoRA')}", "",
        what, "",
        "## How to load it", "", *_usage(settings, pipeline), "",
        "## How it was trained", "", trained, "",
        *(["Teachers:", "", *teachers, ""] if teachers and stage in ("opd", "sft", "merge") else []),
        *_table("setting", {key: value for key, value in settings.items() if value not in ("", None, {}, [])}),
    ]  # fmt: skip
    if scores:
        parts += ["## Scores", "", *_table("score", scores)]
    if metrics:
        parts += ["## Last training metrics", "", *_table("metric", metrics)]
    return "\n".join(parts)


def _is_whole(settings: Mapping) -> bool:
    return settings.get("parameters") == "full" or settings.get("stage") == "pretrain"


def _usage(settings: Mapping, pipeline: str) -> list[str]:
    base, revision = _base_and_revision(str(settings.get("model", "")))
    base = repr(base) + (f", revision={revision!r}" if revision else "")  # Python strings, whatever is in them
    if _is_whole(settings):
        whole = 'AutoModel.from_pretrained("path/to/this/folder", subfolder="transformer", torch_dtype=torch.bfloat16)'
        lines = ["```python", "import torch", "from diffusers import AutoModel" + (f", {pipeline}" if pipeline else "")]
        lines += ["", f"transformer = {whole}"]
        if pipeline:
            lines += [f"pipe = {pipeline}.from_pretrained({base}, transformer=transformer, torch_dtype=torch.bfloat16)"]
        return [*lines, "```"]
    if not pipeline:
        return [
            "```python", "from diffusers import AutoModel", "from peft import PeftModel", "",
            f'transformer = AutoModel.from_pretrained({base}, subfolder="transformer")',
            'transformer = PeftModel.from_pretrained(transformer, "path/to/this/folder")', "```",
        ]  # fmt: skip
    return [
        "With diffusers:", "", "```python", "import torch", f"from diffusers import {pipeline}", "",
        f'pipe = {pipeline}.from_pretrained({base}, torch_dtype=torch.bfloat16).to("cuda")',
        f'pipe.load_lora_weights("path/to/this/folder", weight_name="{LORA_FILE}")',
        *_calls(settings, pipeline), "```", "",
        "With PEFT, instead of `load_lora_weights`:", "", "```python", "from peft import PeftModel", "",
        'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "path/to/this/folder")', "```",
    ]  # fmt: skip


def _calls(settings: Mapping, pipeline: str) -> list[str]:
    """How a picture is drawn as the run drew its students' pictures: steps, guidance and, of Qwen-Image, size."""
    steps, side = f"num_inference_steps={settings.get('eval_steps', 40)!r}", settings.get("resolution", 1024)
    # Distilled from guided teachers (Q 4.3), a student has the guidance in its weights.
    scale = 1.0 if settings.get("guidance") in ("teacher", "neither") else settings.get("cfg", 4.5)
    if not pipeline.startswith("QwenImage"):
        return [f'image = pipe("a photo of two cats", {steps}, guidance_scale={scale!r}).images[0]']
    guided = f'negative_prompt=" ", true_cfg_scale={scale!r}' if scale != 1 else "true_cfg_scale=1.0"
    options = f"{guided}, {steps}, height={side!r}, width={side!r}"
    if "Edit" not in pipeline:
        return [f'image = pipe("a photo of two cats", {options}).images[0]']
    return [
        "from diffusers.utils import load_image", "", 'source = load_image("path/to/a/picture.png")',
        f'image = pipe(image=source, prompt="make the cat blue", {options}).images[0]', "",
        "# It draws from a prompt alone too, through the pipeline that needs no source:",
        "from diffusers import QwenImagePipeline", "",
        'parts = {name: part for name, part in pipe.components.items() if name != "processor"}',
        "draw = QwenImagePipeline(**parts)",
        f'image = draw("a photo of two cats", {options}).images[0]',
    ]  # fmt: skip


def _table(title: str, rows: Mapping) -> list[str]:
    return [f"| {title} | value |", "|---|---|", *(f"| {_cell(k)} | {_cell(v)} |" for k, v in rows.items()), ""]


def _cell(value: object) -> str:
    """Any value as text on one line that Markdown and HTML take literally."""
    # An underscore between letters, as in most names of settings, emphasises nothing and stays readable.
    special = r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(special, r"\\\g<0>", html.escape(_flat(value), quote=False))


def _flat(value: object) -> str:
    """Any value as text on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_flat(k)}={_flat(v)}" for k, v in value.items())
    return " ".join((f"{value:.6g}" if isinstance(value, float) else str(value)).split())

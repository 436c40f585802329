"""How is a LoRA read and written between this project, PEFT and stock diffusers without losing its scale?

A LoRA is two factors a module, A (r, in) and B (out, r), and one number that is in neither: the update of a weight is
alpha / r * B @ A. A reader that loses alpha takes r for it, and the pictures are silently wrong by a factor. Layouts:

    PEFT        adapter_config.json (r, lora_alpha, targets) and adapter_model.safetensors,
                keys `base_model.model.MODULE.lora_A.weight`. What public teachers come in.
    one file    of any name, diffusers' is pytorch_lora_weights.safetensors, keys `transformer.MODULE.lora_A.weight`;
                other trainers spell them otherwise (`KEY`, `PREFIXES`). alpha stands in the file's metadata, or in
                entries of its own, or nowhere.

Modules may differ in r and alpha. What is read has one of each: see `_one_scale`. What libraries only warn of is an
error here.
"""

import copy
import json
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import diffusers
import safetensors.torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from models.hub import PEFT_FILES, ModelError, base_and_revision, hub_id, kind, lora_file, reading

# Every projection of SD3's (and Qwen-Image's) joint attention, as Flow-GRPO publishes its LoRAs; of Qwen-Image-2.1 the
# attention and the MLP, as its public recipes have it. PEFT matches whole dotted endings, so `attn.` keeps out `attn2`,
# the second attention of SD3.5's first blocks, which Flow-GRPO leaves be.
TARGETS = (
    *(f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{layer}" for layer in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"img_mlp.{layer}" for layer in ("proj", "out", "gate_layer")),
)
PREFIX = "base_model.model."  # what PEFT puts before every module name in its files
# What a LoraConfig may say without changing the update alpha / r * B @ A of the weights that the file names.
PLAIN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Other initialisations (pissa, olora, corda, loftq ...) move the base's own weights too, which no adapter file holds.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
# How trainers spell a factor or an alpha of a module: PEFT and diffusers, older PEFT, kohya, older diffusers. kohya
# writes underscores for the dots of the module's name.
KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|alpha)(?:\.default)?(?:\.weight)?")
PREFIXES = re.compile(r"((transformer|diffusion_model|base_model\.model)\.|lora_unet_)*")
SPELLINGS = {"lora_down": "lora_A", "lora_up": "lora_B", "lora.down": "lora_A", "lora.up": "lora_B"}
TEXT_ENCODERS = ("text_encoder", "lora_te")
# Adapters that are often brought here by mistake, and how to tell: the first that is found in the names counts.
FORMATS = {
    r"lora_magnitude_vector|dora_scale": "DoRA", r"lokr_|hada_|oft_": "LoKr, LoHa or OFT (LyCORIS)",
    r"joint_blocks": "SD3 under its original names (ComfyUI)", r"down_blocks|input_blocks|up_blocks": "SD 1.5 or SDXL",
    r"double_blocks|single_(transformer_)?blocks": "FLUX", r"(img|txt)_(mlp|mod)": "Qwen-Image",
    r"ff_context|attn2\.|norm1_context": "SD3", r"^(diffusion_model\.)?(blocks|layers)\.": "Wan or Z-Image",
}  # fmt: skip


def lora_config(rank: int, alpha: float, targets: Sequence[str] = TARGETS) -> LoraConfig:
    """Flow-GRPO's LoRA: gaussian A, zero B, update (alpha / rank) * B @ A on every module that ends in a target."""
    return LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))


# ---------------------------------------------------------------------------------------------------- on a module
def add(module: nn.Module, name: str, config: LoraConfig, state: Mapping[str, Tensor] | None = None) -> None:
    """Put a LoRA on a module, in float32: from `state`, or new (A gaussian, B zero: it begins as the base).

    It freezes the module's own weights. ModelError if `state` and the new factors are not one for one.
    """
    with warnings.catch_warnings():  # several adapters on one module are the point, not an oversight
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, module, name)
    for key, parameter in module.named_parameters():
        if f".{name}." in key:  # small, and trained or compared with what is trained
            parameter.data = parameter.data.float()
    if state is None:
        return
    result = set_peft_model_state_dict(module, dict(state), adapter_name=name)
    # PEFT only warns of these.
    amiss = [*result.unexpected_keys, *(key for key in result.missing_keys if f".{name}." in key)]
    if amiss:
        raise ModelError(f"adapter {name}: its tensors are not those that its modules need: {amiss[0]}")


def state_of(module: nn.Module, name: str) -> dict[str, Tensor]:
    """A copy of one adapter's factors, {MODULE.lora_A.weight: (r, in), MODULE.lora_B.weight: (out, r)}, on the CPU."""
    # PEFT's default for embedding layers, "auto", asks the Hub about the base at every checkpoint.
    state = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}


# -------------------------------------------------------------------------------------------------------- reading
def read_adapter(
    folder: Path, modules: Mapping[str, nn.Module], source: str, fingerprint: str = ""
) -> tuple[dict[str, Tensor], LoraConfig]:
    """An adapter in either layout, checked against a model: ({MODULE.lora_A.weight: (r, in), ...}, config), float32.

    `folder` is what `hub.locate` finds, `modules` are the model's named modules, `source` and `fingerprint` its name
    and the hash of its weights. The config has r, alpha and targets only: a dropout or an initialisation belongs to
    the training that is over. ModelError, one line naming the folder, for what is not readable, another base's, has no
    place in the model, or has an update other than alpha / r * B @ A.
    """
    folder, layout = Path(folder), kind(folder)
    if layout == "full":
        raise ModelError(f"{folder}: a full checkpoint; a LoRA is needed here (--parameters full could start from it)")
    tensors, about = read_factors(folder)
    with reading(folder, f"a plain LoRA of {source}"):
        state, alphas = _placed(tensors, modules, folder)
        config = LoraConfig.from_pretrained(str(folder)) if layout == "peft" else _told(about)
        if config is None:
            scales = {key[:-14]: value.shape[0] for key, value in state.items() if key.endswith(".lora_A.weight")}
            config = lora_config(max(scales.values(), default=1), 1)
            scales = {name: (rank, alphas.get(name, rank)) for name, rank in scales.items()}
            if not alphas:
                file = lora_file(folder)
                _warn_once(f"{file}: does not tell its alpha; read as its rank, which is what stock diffusers does")
        else:
            if alphas:
                raise ValueError("it tells alpha twice, in its config and in entries of its own")
            _check_plain(config)
            scales = {name: _pattern(config, name) for name in (key.rpartition(".lora_")[0] for key in state)}
        _check_places(state, scales, modules)
        state, rank, alpha = _one_scale(state, scales)
    base = about.get("base", "") if layout == "peft" else ""
    _check_base(folder, str(config.base_model_name_or_path or ""), base, source, fingerprint)
    return state, lora_config(rank, alpha, _targets(config, state, modules))


def read_factors(place: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of an adapter's file as they are in it. ModelError if a number is not finite."""
    file = place / PEFT_FILES[1] if kind(place) == "peft" else lora_file(place)
    with reading(place, "a LoRA in safetensors"), safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        if amiss := [key for key, value in tensors.items() if not value.float().isfinite().all()]:
            raise ValueError(f"{amiss[0]} holds numbers that are not finite")
        return tensors, opened.metadata() or {}


def _placed(
    tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], place: Path
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """({MODULE.lora_A.weight: factor}, {MODULE: its alpha}) of tensors under any trainer's names, float32."""
    dotted = {name.replace(".", "_"): name for name in modules} | {name: name for name in modules}
    state, alphas, lost, text = {}, {}, [], 0
    for key, value in tensors.items():
        bare = PREFIXES.sub("", key, count=1)
        match = KEY.fullmatch(bare)
        name = dotted.get(match[1]) if match else None
        if bare.startswith(TEXT_ENCODERS):
            text += 1
        elif name is None:
            lost.append(key)
        elif match[2] == "alpha":
            alphas[name] = float(value)
        else:
            state[f"{name}.{SPELLINGS.get(match[2], match[2])}.weight"] = value.float()
    if lost:
        known = (what for sign, what in FORMATS.items() if any(re.search(sign, key) for key in lost))
        raise ValueError(f"{len(lost)} tensors have no place in the model, as {', '.join(lost[:3])}: its names look "
                         f"like {next(known, 'no known format')}")  # fmt: skip
    if len(state) + len(alphas) + text < len(tensors):
        raise ValueError("it has a factor twice, under two names")
    if text:
        _warn_once(f"{place}: {text} tensors of text encoders are left out; only the transformer's are used")
    return state, alphas


def _told(about: Mapping[str, str]) -> LoraConfig | None:
    """The config in the metadata that diffusers writes; None without one."""
    told = dict(json.loads(about.get("lora_adapter_metadata", "{}")))
    told = {key.removeprefix("transformer."): value for key, value in told.items() if "text_encoder" not in key}
    return LoraConfig(**told) if told else None


def _pattern(config: LoraConfig, name: str) -> tuple[int, float]:
    """(r, alpha) of a module, such that its update is alpha / r * B @ A."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), name), config.r)
    alpha = alphas.get(get_pattern_key(alphas.keys(), name), config.lora_alpha)
    # Rank-stabilised LoRA divides by sqrt(r): the same update as a plain LoRA of alpha * sqrt(r).
    return rank, alpha * (math.sqrt(rank) if config.use_rslora else 1)


def _one_scale(
    state: Mapping[str, Tensor], scales: Mapping[str, tuple[int, float]]
) -> tuple[dict[str, Tensor], int, float]:
    """The same updates with one r, the largest, and one alpha for all modules -> (state, r, alpha).

    Smaller factors get rows (A) and columns (B) of zeros, which stay zeros in training: each is the other's gradient.
    B takes up the quotient of its own alpha / r and the most frequent one.
    """
    if amiss := [alpha for _, alpha in scales.values() if not math.isfinite(alpha)]:
        raise ValueError(f"its lora_alpha is {amiss[0]}")
    if len({*scales.values()}) == 1:
        return dict(state), *next(iter(scales.values()))
    most = max(rank for rank, _ in scales.values())
    common = Counter(alpha / rank for rank, alpha in scales.values()).most_common(1)[0][0] or 1.0
    padded = {}
    for name, (rank, alpha) in scales.items():
        a, b = (state[f"{name}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        padded[f"{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, most - rank))
        padded[f"{name}.lora_B.weight"] = nn.functional.pad(b, (0, most - rank)) * (alpha / rank / common)
    return padded, most, common * most


def _check_plain(config: LoraConfig) -> None:
    """ValueError if a config's update is not alpha / r * B @ A on the modules that the tensors name."""
    usual = LoraConfig().to_dict()
    for name, value in config.to_dict().items():
        harmless = name in PLAIN or not value and not usual[name] or value == usual[name]
        if not harmless or name == "init_lora_weights" and value not in PLAIN_INITS:
            raise ValueError(f"its {name} is {value}")


def _check_places(
    state: Mapping[str, Tensor], scales: Mapping[str, tuple[int, float]], modules: Mapping[str, nn.Module]
) -> None:
    """ValueError unless every tensor is a factor of a linear layer, and every factor has its partner."""
    if not state:
        raise ValueError("it holds no tensor at all")
    for key, value in state.items():
        name, _, factor = key.removesuffix(".weight").rpartition(".")
        layer, partner = modules.get(name), {"lora_A": "lora_B", "lora_B": "lora_A"}.get(factor)
        wide = getattr(layer, "in_features", 0), getattr(layer, "out_features", 0)
        rank = scales.get(name, (0, 0))[0]
        fits = tuple(value.shape) == ((rank, wide[0]) if factor == "lora_A" else (wide[1], rank))
        if not fits or f"{name}.{partner}.weight" not in state:
            shape = f"{key}, {tuple(value.shape)},"
            raise ValueError(f"{shape} is not one of two factors of rank {rank} of a linear layer of the model")


def _check_base(folder: Path, named: str, base: str, source: str, fingerprint: str) -> None:
    """ModelError if the adapter was trained on other weights; the shapes of two bases of one kind agree."""
    names = [hub_id(named).lower(), hub_id(source).lower()]
    if (base != fingerprint) if base and fingerprint else all(names) and names[0] != names[1]:
        raise ModelError(
            f"{folder}: trained on another base ({named or base}) than {source}; give that one, or correct "
            "base_model_name_or_path if they are the same"
        )


def _targets(config: LoraConfig, state: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> list[str]:
    """Target names that select exactly the modules that have factors: the config's own, or else their full names."""
    adapted = {key.rpartition(".lora_")[0] for key in state}
    own = tuple(map(str, config.target_modules)) if isinstance(config.target_modules, list | set | tuple) else ()
    selected = {name for name in modules if name in own or name.endswith(tuple(f".{target}" for target in own))}
    return sorted(own if selected == adapted else adapted)


@cache
def _warn_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


# -------------------------------------------------------------------------------------------------------- writing
def save_adapter(
    folder: Path, state: Mapping[str, Tensor], config: LoraConfig, source: str = "", fingerprint: str = "",
    pipeline: str = "",
) -> None:  # fmt: skip
    """Write an adapter in PEFT's layout and, if `pipeline` is a diffusers pipeline with LoRAs, in diffusers' too.

    The files hold float32. `source` is the base as the user names it; `fingerprint`, the hash of its weights, lets
    `read_adapter` refuse the adapter on another base. Not atomic: a run renames the whole checkpoint when it is done.
    """
    config = copy.copy(config)
    name, revision = base_and_revision(source)
    config.base_model_name_or_path, config.revision = name or None, revision or None
    if isinstance(config.target_modules, set):  # a set's order changes from process to process
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    state = {key: value.detach().float().cpu().contiguous() for key, value in state.items()}
    tensors = {PREFIX + key: value for key, value in state.items()}
    safetensors.torch.save_file(tensors, folder / PEFT_FILES[1], metadata={"format": "pt", "base": fingerprint})
    save = getattr(getattr(diffusers, pipeline, None), "save_lora_weights", None) if pipeline else None
    if save is not None:
        # Without the metadata, stock `load_lora_weights` takes r for alpha and draws other pictures.
        save(folder, transformer_lora_layers=state, transformer_lora_adapter_metadata=config.to_dict())

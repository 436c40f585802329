"""How is a LoRA read and written between this project, PEFT and stock diffusers without losing its scale?

A LoRA is two factors a module, A (r, in) and B (out, r), and one number that is in neither: the update of a weight is
alpha / r * B @ A. A reader that loses alpha takes r for it, and the pictures are silently wrong by a factor. Layouts:

    PEFT        adapter_config.json (r, lora_alpha, targets) and adapter_model.safetensors,
                keys `base_model.model.MODULE.lora_A.weight`. What public teachers come in.
    diffusers   pytorch_lora_weights.safetensors, keys `transformer.MODULE.lora_A.weight`. alpha stands in the file's
                metadata, or in entries of its own, or nowhere. What `load_lora_weights` reads.

The libraries' own readers and writers do the work. What they only warn of is an error here.
"""

import copy
import math
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import diffusers
import safetensors.torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import safe_open
from torch import Tensor, nn

from models.hub import LORA_FILE, PEFT_FILES, ModelError, base_and_revision, hub_id, kind, reading

# Every projection of SD3's (and Qwen-Image's) joint attention, as Flow-GRPO publishes its LoRAs. PEFT matches whole
# dotted endings, so `attn.` keeps out `attn2`, the second attention of SD3.5's first blocks, which Flow-GRPO leaves be.
TARGETS = tuple(
    f"attn.{layer}"
    for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
PREFIX = "base_model.model."  # what PEFT puts before every module name in its files
# What a LoraConfig may say without changing the update alpha / r * B @ A of the weights that the file names.
PLAIN = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "r",
    "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Other initialisations (pissa, olora, corda, loftq ...) move the base's own weights too, which no adapter file holds.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


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

    `modules` are the model's named modules, `source` and `fingerprint` its name and the hash of its weights. The
    config has r, alpha and targets only: a dropout or an initialisation belongs to the training that is over.
    ModelError, one line naming the folder, for what is not readable, another base's, has no place in the model, or
    has an update other than alpha / r * B @ A with one alpha and r for all.
    """
    folder, layout = Path(folder), kind(folder)
    if layout == "full":
        raise ModelError(f"{folder}: a full checkpoint, and an adapter is needed here; give a LoRA's folder")
    with reading(folder, f"a plain LoRA of {source}"):
        state, config, base = (_read_peft if layout == "peft" else _read_diffusers)(folder)
        _check_plain(config)
        _check_places(state, config.r, modules)
        # Rank-stabilised LoRA divides by sqrt(r): the same update as a plain LoRA of alpha * sqrt(r).
        alpha = config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1)
        if not math.isfinite(alpha):
            raise ValueError(f"its lora_alpha is {alpha}")
    _check_base(folder, str(config.base_model_name_or_path or ""), base, source, fingerprint)
    state = {key: value.float() for key, value in state.items()}
    return state, lora_config(config.r, alpha, _targets(config, state, modules))


def _read_peft(folder: Path) -> tuple[dict[str, Tensor], LoraConfig, str]:
    config = LoraConfig.from_pretrained(str(folder))
    state = load_peft_weights(str(folder), device="cpu")
    with safe_open(folder / PEFT_FILES[1], "pt") as opened:
        base = (opened.metadata() or {}).get("base", "")
    older = ".default.weight"  # what older versions of PEFT wrote
    return {key.removeprefix(PREFIX).replace(older, ".weight"): value for key, value in state.items()}, config, base


def _read_diffusers(folder: Path) -> tuple[dict[str, Tensor], LoraConfig, str]:
    file = folder / LORA_FILE
    # Qwen-Image's reader knows the names of other trainers too, and multiplies A by the alpha / r of its entries.
    read = diffusers.QwenImagePipeline.lora_state_dict
    state, told = read(str(folder), weight_name=LORA_FILE, use_safetensors=True, return_lora_metadata=True)
    state = {re.sub(r"^(transformer\.)+", "", key): value for key, value in state.items()}
    with safe_open(file, "pt") as opened:
        has_alpha = any(key.endswith(".alpha") for key in opened.keys())  # noqa: SIM118
    if told:
        if has_alpha:
            raise ValueError("it tells alpha twice, in its metadata and in entries of its own")
        told = {key.removeprefix("transformer."): value for key, value in told.items()}
        return state, LoraConfig(**told), ""
    rank = next(value.shape[0] for key, value in state.items() if ".lora_A." in key)
    if not has_alpha:
        _warn_once(f"{file}: does not tell its alpha; read as {rank}, its rank, which is what stock diffusers does")
    return state, lora_config(rank, rank), ""


def _check_plain(config: LoraConfig) -> None:
    """ValueError if a config's update is not alpha / r * B @ A on the modules that the tensors name."""
    usual = LoraConfig().to_dict()
    for name, value in config.to_dict().items():
        harmless = name in PLAIN or not value and not usual[name] or value == usual[name]
        if not harmless or name == "init_lora_weights" and value not in PLAIN_INITS:
            raise ValueError(f"its {name} is {value}")


def _check_places(state: Mapping[str, Tensor], rank: int, modules: Mapping[str, nn.Module]) -> None:
    """ValueError unless every tensor is a finite factor of a linear layer, and every factor has its partner."""
    if not state:
        raise ValueError("it holds no tensor at all")
    for key, value in state.items():
        name, _, factor = key.removesuffix(".weight").rpartition(".")
        layer, partner = modules.get(name), {"lora_A": "lora_B", "lora_B": "lora_A"}.get(factor)
        wide = getattr(layer, "in_features", 0), getattr(layer, "out_features", 0)
        fits = tuple(value.shape) == ((rank, wide[0]) if factor == "lora_A" else (wide[1], rank))
        if not fits or f"{name}.{partner}.weight" not in state or not value.isfinite().all():
            shape = f"{key}, {tuple(value.shape)},"
            raise ValueError(f"{shape} is not one of two finite factors of rank {rank} of a linear layer of the model")


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

"""Does what is installed work together, and is it what requirements.lock says? `make` asks before any test runs.

    .venv/bin/python -m tests.install_check

`pip check` compares declared ranges and nothing else. It was silent when a new transformers refused the newest peft
that the index had. So this compares the versions, imports everything, and trains one LoRA on a tiny VLM. It needs no
network. A failure is one line that says what to do.
"""

import importlib
import importlib.util
import re
import sys
import tomllib
import warnings
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
AGAIN = "run: rm -rf .venv && make .venv/installed"
RENEW = "run: make lock"
# faces.py only takes this package's files. Importing it fails: it asks for pkg_resources, which setuptools dropped.
ONLY_FILES = {"face_recognition_models"}


class Fault(Exception):
    """What is wrong, and what to do about it, in one line."""


def read_lock() -> dict[str, str]:
    """{name: version} of the lock. Each line is NAME==VERSION: no local build, no address, no hash, no marker."""
    pins = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            if not (pin := re.fullmatch(r"([A-Za-z0-9][\w.-]*)==(\d[\w.]*)", line)):
                raise Fault(f"requirements.lock: {line!r} is not NAME==VERSION; {RENEW}")
            pins[canonicalize_name(pin[1])] = pin[2]
    return pins


def read_pyproject() -> list[Requirement]:
    """What the project asks for itself, with everything that its extra `test` brings in."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, extras = [Requirement(line) for line in project["dependencies"]], ["test"]
    while extras:
        for wanted in map(Requirement, project["optional-dependencies"][extras.pop()]):
            if wanted.name == project["name"]:
                extras += wanted.extras
            else:
                found.append(wanted)
    return found


def check_versions(pins: dict[str, str], wanted: list[Requirement]) -> None:
    """pyproject's ranges hold the lock's versions, and the lock's versions are the ones installed."""
    for requirement in wanted:
        version = pins.get(canonicalize_name(requirement.name), "no version")
        if version == "no version" or not requirement.specifier.contains(version):
            raise Fault(f"pyproject.toml asks for {requirement}, requirements.lock has {version}; {RENEW}")
    for name, version in pins.items():
        try:
            installed = metadata.version(name).split("+")[0]  # 2.13.0+cpu is a build of 2.13.0
        except metadata.PackageNotFoundError:
            installed = "no version"
        if installed != version:
            raise Fault(f"{name}: {installed} is installed, requirements.lock says {version}; {AGAIN}")


def check_imports(wanted: list[Requirement]) -> None:
    """Every dependency that pyproject names, then every module of the project."""
    names = {canonicalize_name(requirement.name) for requirement in wanted}
    provided = metadata.packages_distributions().items()
    for module in sorted(m for m, owners in provided if names & set(map(canonicalize_name, owners))):
        if module in ONLY_FILES:
            found = importlib.util.find_spec(module)
        elif module.isidentifier() and not module.startswith("_"):
            found = importing(module, AGAIN)
        else:
            continue
        if found is None:
            raise Fault(f"{module}: not found; {AGAIN}")
    files = [*ROOT.glob("*.py"), *(f for init in ROOT.glob("[!.]*/__init__.py") for f in init.parent.glob("*.py"))]
    for file in sorted(f for f in files if not f.stem.startswith("__")):
        importing(".".join(file.relative_to(ROOT).with_suffix("").parts), "repair this module, or " + AGAIN)


def importing(module: str, what_to_do: str):
    """The module, or a Fault."""
    try:
        return importlib.import_module(module)
    except Exception as fault:
        raise Fault(f"cannot import {module} ({one_line(fault)}); {what_to_do}") from fault


def check_lora() -> None:
    """One LoRA on a tiny Qwen2.5-VL with random weights: one picture forward, and a gradient in every LoRA factor."""
    try:
        grads = lora_gradients()
    except Exception as fault:
        raise Fault(f"a LoRA on a tiny VLM does not train ({one_line(fault)}); {AGAIN}") from fault
    amiss = [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()]
    if amiss or not any(grad.any() for grad in grads.values()):
        raise Fault(f"a LoRA on a tiny VLM has wrong gradients ({', '.join(amiss) or 'none but zero'}); {AGAIN}")


def lora_gradients() -> dict:
    """{name of a trainable parameter: its gradient}."""
    import torch

    from models.lora import lora_config
    from scorers.vlm_trained import TARGETS, VLMJudge
    from tests.helpers.qwen_hub import build_vlm

    with TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        judge = VLMJudge(str(build_vlm(Path(folder))))
        judge.add_lora(lora_config(2, 4.0, TARGETS))
    judge.scores([torch.rand(3, 60, 60)], ["a cat"]).sum().backward()
    return {name: p.grad for name, p in judge.trainable().items()}


def one_line(fault: Exception) -> str:
    return " ".join(f"{type(fault).__name__}: {fault}".split())[:300]


def main() -> None:
    try:
        pins, wanted = read_lock(), read_pyproject()
        check_versions(pins, wanted)
        check_imports(wanted)
        check_lora()
    except Fault as fault:
        sys.exit(f"install check: {fault}")
    print(f"install check: {len(pins)} locked versions installed, everything imports, a LoRA trains on a tiny VLM")


if __name__ == "__main__":
    main()

"""What a run trains: the weights, what follows them at a distance, and one optimizer update."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import nft
from harness.ranks import average, own
from models.flow import FlowModel
from settings import RL, TRAINED, Settings


def optimizers(model: FlowModel, s: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, as in F. When the tiny base is pretrained, Muon trains the matrices of its blocks.

    DEVIATION (F's code): AdamW's second beta is 0.999 there, and here 0.99, for runs of some hundred steps.

    Pretraining is the longest stage on a CPU. Muon (from torch.optim, its updates scaled to AdamW's size, so that one
    learning rate serves both) reached AdamW's loss in about half the steps there, in one run of each.
    """
    trained = model.trainable()
    inner = {n for n, p in trained.items() if s.stage == "pretrain" and p.ndim == 2 and "transformer_blocks" in n}
    others = [p for n, p in trained.items() if n not in inner]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, s.lr, (0.9, 0.99), weight_decay=s.weight_decay)]
    if inner:
        matrices = [trained[n] for n in trained if n in inner]
        muon = torch.optim.Muon(matrices, s.lr, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw")
        found.append(muon)
    return found


def poisoned(model: FlowModel) -> str:
    """Which of a model's weights is not finite, in words: of the base, an adapter, an expert; "" if all are."""
    named = (getattr(model, name, None) for name in ("backbone", "network", "transformer"))  # of a flow, of a judge
    base = next((module for module in named if module), model)
    parts = {f"the base {getattr(model, 'source', '')}": base, "the student": getattr(model, "transformer", base)}
    parts |= {f"the expert {name}": expert.module for name, expert in getattr(model, "hosted", {}).items()}
    for who, module in parts.items():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.is_floating_point() and not own(value.detach()).isfinite().all():
                adapter = next((a for a in getattr(model, "adapters", ()) if f".{a}." in name), "")
                return f"{f'the adapter {adapter}' if adapter else who} has a number that is not finite in {name}"
    return ""


class Weights:
    """The trained tensors of a model by name, their average, DiffusionNFT's old policy, and the optimizers."""

    def __init__(self, model: FlowModel, s: Settings):
        self.s, self.model = s, model
        self.parameters = model.trainable()
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()}  # the EMA: what is exported
        # DiffusionNFT's old policy, which draws (Q Eq. 7): it follows the student at a distance
        self.old = {n: p.detach().clone() for n, p in self.parameters.items()} if s.stage == "nft" else {}
        # --overlap: who draws, or has drawn, the step under way. A run that is stopped has it drawn again by the same.
        ahead = s.stage in RL and s.overlap
        self.drawer = {n: p.detach().clone() for n, p in self.parameters.items()} if ahead else {}
        # How large the gradient is at each state, for `opd.state_probabilities`
        self.state_size = torch.zeros(s.num_steps if s.stage == "opd" else 0, dtype=torch.float64)
        self.optimizers = optimizers(model, s) if s.stage in TRAINED else []

    def update(self, step: int) -> float:
        """Average the gradients over ranks, clip them, step the optimizers and the average -> the gradient's norm.

        A gradient that is not finite is a FloatingPointError, before it reaches the weights.
        """
        s, parameters = self.s, list(self.parameters.values())
        missing = sum(p.grad is None for p in parameters)
        if missing:
            raise RuntimeError(f"{missing} of {len(parameters)} trained tensors have no gradient")
        average([p.grad for p in parameters if not isinstance(p, DTensor)])  # sharded ones come averaged (FSDP2)
        norm = torch.nn.utils.clip_grad_norm_(parameters, s.grad_norm)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if not np.isfinite(norm):
            why = poisoned(self.model) or f"the gradient's norm is {norm}; lower --lr or look at the rewards"
            raise FloatingPointError(f"step {step}: {why}")
        rise = min(1.0, (step + 1) / max(s.warmup, 1))
        fall = 0.5 + 0.5 * np.cos(np.pi * step / s.steps) if s.decay else 1.0
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = s.lr * rise * float(fall)
            optimizer.step()
            optimizer.zero_grad()
        done = self.updates()
        if done % s.ema_every == 0 or step + 1 == s.steps:  # a short run would export its start, otherwise
            # With ema_decay alone the average would remember the start for long; n/(9+n) lets it follow at first.
            decay = min(s.ema_decay, done / (9 + done))
            torch._foreach_lerp_([own(a) for a in self.average.values()], self.now(), 1 - decay)
        return norm

    def updates(self) -> int:
        """How many optimizer updates there have been, those before a resume included: AdamW counts them."""
        adamw = self.optimizers[0]
        return int(adamw.state[adamw.param_groups[0]["params"][0]]["step"])

    def now(self) -> list[Tensor]:
        """This rank's part of the trained tensors."""
        return [own(p.detach()) for p in self.parameters.values()]

    def follow(self, step: int) -> None:
        """Let DiffusionNFT's old policy follow the student, once a step (Q Eq. 7)."""
        if self.old:
            nft.ema_update([own(o) for o in self.old.values()], self.now(), nft.old_policy_decay(step))

    def drew(self) -> None:
        """With --overlap, before a step's updates if the next one is drawn already, and after them if it is not."""
        for name, value in self.drawer.items():
            own(value).copy_(own((self.old or self.parameters)[name].detach()))

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Context: the parameters hold `values` inside, and their own numbers again after it."""
        mine = {n: own(p.detach()).clone() for n, p in self.parameters.items()}
        for name, p in self.parameters.items():
            own(p.data).copy_(own(values[name]))
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                own(p.data).copy_(mine[name])

    # -------------------------------------------------------------------------------- what a checkpoint has to hold
    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Every tensor that continuing needs, under one flat set of names, and how many updates each one has had."""
        tensors = {f"weights.{n}": p.detach() for n, p in self.parameters.items()}
        tensors |= {f"average.{n}": a for n, a in self.average.items()}
        tensors |= {f"old.{n}": o for n, o in self.old.items()}
        tensors |= {f"drawer.{n}": d for n, d in self.drawer.items()}
        tensors |= {"state_size": self.state_size} if len(self.state_size) else {}
        updates = {}
        for name, p in self.parameters.items():
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(p, {}).items():
                    if key == "step":
                        updates[name] = float(value)
                    else:
                        tensors[f"{key}.{name}"] = value
        return tensors, updates

    def make_moments(self, updates: Mapping[str, float]) -> None:
        """Let the optimizers create their moments, for a checkpoint to fill, as after so many updates of each tensor.

        This takes an update with zero gradients at rate zero.
        """
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
            optimizer.zero_grad()
            for name, p in self.parameters.items():
                if "step" in optimizer.state.get(p, {}):
                    optimizer.state[p]["step"].fill_(updates[name])

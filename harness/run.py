"""What does a run need besides mathematics: ranks, checkpoints that survive a kill, metrics?

A run is the folder `runs/NAME/`:

    config.json        the resolved settings
    metrics.jsonl      one object a step (keys: README)
    samples/           grids of pictures with prompts and scores
    checkpoints/       step-NNNNNN/, written under another name and renamed when complete:
                         the student's exported (averaged) weights, ready for the Hub, with a model card,
                         training/ and training.json: everything that continuing needs
    report.md          tables and plots of the run
    (TensorBoard events beside them)

Exact resume. All randomness of step s comes from generators seeded by (seed, stage, s, what for), so no RNG state
and no data position has to be saved: weights, averaged weights, optimizer moments and the step number are the whole
state. A run killed at any instant continues from its last complete checkpoint and ends with the same bits on a CPU.
A trajectory's noise belongs to its prompt and its place in the global batch, not to a rank: two ranks with three
prompts each draw what one rank with six does, and a checkpoint goes on with another number of ranks.
"""

import json
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import nft
from data import files as data
from data.common import write_atomic
from harness.ranks import any_rank, average, average_numbers, own, rank_and_world, reason, wait
from models import lora as adapters
from models.flow import FlowModel
from settings import Settings, SettingsError

# Settings that may change when a run is continued: they move no number of a step, or only who computes it. (With
# --overlap, `steps` and `save_every` decide before which steps nothing is drawn ahead.)
FREE = (
    "steps", "save_every", "keep", "eval_prompts", "eval_steps", "device", "parallel", "micro_batch",
    "prompts_per_step", "gradient_checkpointing", "timeout", "wandb",
)  # fmt: skip


class Stopped(Exception):
    """The run was asked to stop (SIGTERM), has saved its state, and can be continued."""


def optimizers(model: FlowModel, s: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, as in F; when the tiny base is pretrained, Muon for the matrices of its blocks.

    Pretraining is the longest stage on a CPU, and Muon (from torch.optim, its updates scaled to AdamW's size so
    that one learning rate serves both) reached AdamW's loss in about half the steps there, in one run of each.
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


# ---------------------------------------------------------------------------------------------------------- runs
class Run:
    """One stage's run: its folder, what it trains, and where it stands."""

    def __init__(self, settings: Settings, model: FlowModel, lora: "adapters.LoraConfig | None" = None):
        self.s, self.model, self.lora = settings, model, lora
        self.rank, self.world = rank_and_world()
        self.folder = Path(settings.out) / settings.name
        self.step = 0
        self.parameters = model.trainable()
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()}  # the EMA: what is exported
        # DiffusionNFT's old policy, which draws (Q Eq. 7): it follows the student at a distance
        self.old = {n: p.detach().clone() for n, p in self.parameters.items()} if settings.stage == "nft" else {}
        self.optimizers = optimizers(model, settings)
        self.asked_to_stop = False
        self.last: dict[str, float] = {}  # the newest line of metrics
        if self.rank == 0:
            self._prepare_folder()
        wait()
        if settings.stage != "merge":  # a merge has no state to go on from, and its teachers may have changed on disk
            self._resume()
        self._board, self._wandb = None, None

    def generator(self, *what: int | str) -> torch.Generator:
        """A fresh generator for one purpose at the present step, the same on every rank unless `what` names it."""
        seed = data.seed_for(self.s.seed, self.s.stage, self.s.task, self.step, *what)
        return torch.Generator().manual_seed(seed)

    def _prepare_folder(self) -> None:
        resolved = {k: v for k, v in asdict(self.s).items() if k not in ("resume", "dry_run", "config", "threads")}
        file = self.folder / "config.json"
        if not self.s.resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        if file.exists():
            old = json.loads(file.read_text())
            changed = [k for k in resolved if k not in FREE and k in old and old[k] != resolved[k]]
            if changed and adapters.last_checkpoint(self.folder):
                k = changed[0]
                raise SettingsError(
                    f"{self.folder} was made with --{k.replace('_', '-')} {old.get(k)}, not {resolved[k]}: "
                    "give another --name, or --no-resume to start it anew"
                )
        for stale in sorted((self.folder / "checkpoints").glob(".*")):
            whole = stale.with_name(stale.name[1:].removesuffix("-old"))
            if stale.name.endswith("-old") and not whole.exists():  # killed between the two renames of `save`
                stale.rename(whole)
            else:
                shutil.rmtree(stale)
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(resolved, indent=1) + "\n")

    # -------------------------------------------------------------------------------------------- training steps
    def steps(self, shown: str = "reward") -> Iterator[int]:
        """The steps that are left, with a progress bar that shows the metric `shown`; saves as it goes."""
        bar = tqdm(total=self.s.steps, initial=self.step, desc=self.s.name, disable=self.rank > 0, dynamic_ncols=True)
        before = signal.signal(signal.SIGTERM, self._ask_to_stop)
        try:
            while self.step < self.s.steps:
                self._shown, self._bar = shown, bar
                self.stop_if_asked()
                yield self.step
                self.step += 1
                bar.update()
                if self.step % self.s.save_every == 0 or self.step == self.s.steps:
                    self.save()
        finally:
            signal.signal(signal.SIGTERM, before)
            bar.close()
            if self._board:
                self._board.close()
            if self._wandb:  # `wandb.init` of the next stage would hand out this one again
                self._wandb.finish()

    def _ask_to_stop(self, *_: object) -> None:
        self.asked_to_stop = True

    def stop_if_asked(self) -> None:
        """Save and raise `Stopped`, on every rank, once any rank has had SIGTERM.

        Called before a step and between its micro-batches, where no weight has been touched yet: what is saved is
        the last whole step, and the one under way is done again on resuming. A scheduler's grace period need not
        be longer than a micro-batch and a save.
        """
        if any_rank(self.asked_to_stop):  # ranks are told at different moments; they stop at one
            self.save()
            raise Stopped(f"{self.s.name}: stopped by SIGTERM, {self.checkpoint} saved; repeat the command to go on")

    def update(self) -> float:
        """Average gradients over ranks, clip, AdamW, EMA: one optimizer update -> the gradient's norm.

        A gradient that is not finite ends the run here, before it reaches the weights.
        """
        parameters = list(self.parameters.values())
        missing = [p for p in parameters if p.grad is None]
        if missing:
            raise RuntimeError(f"{len(missing)} of {len(parameters)} trained tensors have no gradient")
        average([p.grad for p in parameters if not isinstance(p, DTensor)])  # sharded ones come averaged (FSDP2)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.s.grad_norm)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if not np.isfinite(norm):
            raise FloatingPointError(
                f"step {self.step}: the gradient's norm is {norm}; lower --lr or look at the rewards"
            )
        rise = min(1.0, (self.step + 1) / max(self.s.warmup, 1))
        fall = 0.5 + 0.5 * np.cos(np.pi * self.step / self.s.steps) if self.s.decay else 1.0
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.s.lr * rise * float(fall)
            optimizer.step()
            optimizer.zero_grad()
        if (self.step + 1) % self.s.ema_every == 0:
            # Early on the average would remember the start for long; (1+s)/(10+s) lets it follow at first.
            decay = min(self.s.ema_decay, (1 + self.step) / (10 + self.step))
            averages = [own(a) for a in self.average.values()]
            torch._foreach_lerp_(averages, [own(p.detach()) for p in parameters], 1 - decay)
        if self.old:
            now = [own(p.detach()) for p in parameters]
            nft.ema_update([own(p) for p in self.old.values()], now, nft.old_policy_decay(self.step))
        return norm

    def fail_together(self, fault: Exception | None, kind: type[Exception]) -> None:
        """Where any rank has met a fault, save the last whole step on all of them, and raise: each its own, if any."""
        if any_rank(fault is not None):
            self.save()
            raise fault or kind("another rank has failed; its message says why")

    def log(self, metrics: dict[str, float], histograms: Mapping[str, np.ndarray] | None = None) -> dict[str, float]:
        """One line of metrics.jsonl and TensorBoard (and wandb) for this step -> the means over ranks.

        A number that is nan everywhere, such as a reward that was not asked for, is left out. Histograms are rank 0's.
        """
        if self.model.device.type == "cuda":
            metrics = {**metrics, "memory": torch.cuda.max_memory_allocated() / 2**30}
        metrics = {key: value for key, value in average_numbers(metrics).items() if not np.isnan(value)}
        if self.rank > 0:
            return metrics
        self.last = {k: float(f"{v:.6g}") for k, v in metrics.items()}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step + 1, **self.last}) + "\n")
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # half a second, paid only by runs that log

            self._board = SummaryWriter(self.folder)
            self._wandb = start_wandb(self.s, self.folder) if self.s.wandb else None
        for key, value in metrics.items():
            self._board.add_scalar(key, value, self.step + 1)
        for key, values in (histograms or {}).items():
            self._board.add_histogram(key, values, self.step + 1)
        if self._wandb:
            self._wandb.log(metrics, step=self.step + 1)
        if self._shown in metrics:
            self._bar.set_postfix_str(f"{self._shown} {metrics[self._shown]:.3f}")
        return metrics

    def history(self, key: str) -> list[float]:
        """A metric's values of the steps that are done; what was logged before a resume is on disk."""
        file = self.folder / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [row[key] for row in rows if key in row and row["step"] <= self.step]

    # ------------------------------------------------------------------------------------------------ checkpoints
    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / f"step-{self.step:06d}"

    def exported(self) -> "Swap":
        """Context: the model runs with its averaged weights, which are what a checkpoint exports."""
        return Swap(list(self.parameters.values()), list(self.average.values()))

    def old_policy(self) -> "Swap":
        """Context: the model runs with the old policy's weights (nft)."""
        return Swap(list(self.parameters.values()), list(self.old.values()))

    def save(self) -> None:
        """Write step-NNNNNN/ under a hidden name and rename it: a checkpoint is complete or absent."""
        hidden = self.checkpoint.with_name("." + self.checkpoint.name)
        if self.rank == 0:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
        wait()
        self._export(hidden)
        tensors, counts = self._state()
        # DCP's safetensors writer: each rank writes its own part, any number of ranks reads it, nothing is pickled.
        writer = dcp.HuggingFaceStorageWriter(str(hidden / "training"), save_distributed=True)
        with _alone_without_warning():
            dcp.save(tensors, storage_writer=writer)
        if self.rank == 0:
            write_atomic(hidden / "training.json", json.dumps({"step": self.step, "updates": counts}) + "\n")
            if self.checkpoint.exists():
                self.checkpoint.rename(hidden.with_name(hidden.name + "-old"))
            hidden.rename(self.checkpoint)
            shutil.rmtree(hidden.with_name(hidden.name + "-old"), ignore_errors=True)
            for old in sorted((self.folder / "checkpoints").glob("step-*"))[: -self.s.keep]:
                shutil.rmtree(old)
            if self._board:
                self._board.flush()
        wait()

    def _export(self, folder: Path) -> None:
        """What others can use: the averaged weights as an adapter or a transformer, and a model card."""
        with self.exported():
            if self.lora is None:
                # Gathered from all ranks; filled on rank 0 only.
                options = StateDictOptions(full_state_dict=True, cpu_offload=True)
                state = get_model_state_dict(self.model.transformer, options=options)
                if self.rank == 0:
                    self.model.save_full(folder, state)
            elif self.rank == 0:
                m = self.model
                adapters.save_adapter(folder, m.adapter_state(), self.lora, m.source, m.fingerprint, m.pipeline)
        if self.rank == 0:
            self.write_card(folder, {})

    def write_card(self, folder: Path, scores: dict[str, float]) -> None:
        """The model card of a checkpoint, README.md; scores are known once the run has ended."""
        card = adapters.model_card(asdict(self.s), self.last, scores, self.step, self.model.pipeline)
        write_atomic(folder / "README.md", card)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """All that continuing needs, as one flat dict of tensors, and how many updates each tensor has had."""
        tensors = {f"weights.{n}": p.detach() for n, p in self.parameters.items()}
        tensors |= {f"average.{n}": a for n, a in self.average.items()}
        tensors |= {f"old.{n}": o for n, o in self.old.items()}
        counts = {}
        for name, p in self.parameters.items():
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(p, {}).items():
                    if key == "step":
                        counts[name] = float(value)
                    else:
                        tensors[f"{key}.{name}"] = value
        return tensors, counts

    def _resume(self) -> None:
        last = adapters.last_checkpoint(self.folder)
        if last is None:
            if self.rank == 0:
                (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            return
        try:
            state = json.loads((last / "training.json").read_text())
            if state["updates"]:
                self._make_moments()
            reader = dcp.HuggingFaceStorageReader(str(last / "training"))
            for name, entry in reader.read_metadata().state_dict_metadata.items():  # DCP would leave a gap as it is
                if sum(chunk.sizes.numel() for chunk in entry.chunks) < entry.size.numel():
                    raise ValueError(f"a part of {name} is missing")
            with _alone_without_warning():
                dcp.load(self._state()[0], storage_reader=reader)
            for optimizer in self.optimizers:
                for p, moments in optimizer.state.items():
                    if "step" in moments:
                        name = next(n for n, q in self.parameters.items() if q is p)
                        moments["step"].fill_(state["updates"][name])
            self.step = state["step"]
        except (Exception, CheckpointException) as fault:  # DCP's own is no Exception
            raise adapters.ModelError(
                f"{last / 'training'}: cannot resume from it ({reason(fault)}); remove {last} to continue from an "
                "earlier checkpoint, or start anew with --no-resume"
            ) from fault
        if self.rank == 0:  # lines written after the checkpoint would appear twice
            file = self.folder / "metrics.jsonl"
            lines = file.read_text().splitlines() if file.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
            write_atomic(file, "".join(line + "\n" for line in kept))
            print(f"{self.s.name}: continues from {last}", file=sys.stderr)

    def _make_moments(self) -> None:
        """Let the optimizers create their state, for the checkpoint to fill: an update by nothing, at rate zero."""
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
            optimizer.zero_grad()


class Swap:
    """Context: `parameters` hold `values` inside and their own again after."""

    def __init__(self, parameters: Sequence[Tensor], values: Sequence[Tensor]):
        self.parameters, self.values = parameters, values

    def __enter__(self) -> None:
        self.own = [own(p.detach()).clone() for p in self.parameters]
        for p, v in zip(self.parameters, self.values, strict=True):
            own(p.data).copy_(own(v))

    def __exit__(self, *_: object) -> None:
        for p, v in zip(self.parameters, self.own, strict=True):
            own(p.data).copy_(v)


@contextmanager
def _alone_without_warning() -> Iterator[None]:
    """DCP warns a run of one process that it is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def require_extra(module: str, extra: str, flag: str) -> None:
    """SettingsError, before anything is loaded, where an optional dependency is asked for and not installed."""
    if find_spec(module) is None:
        raise SettingsError(f"{flag} needs the extra {extra!r}: pip install -e '.[{extra}]'")


def start_wandb(s: Settings, folder: Path):
    """The run's mirror on Weights & Biases; a run that is continued goes on there too."""
    import wandb

    identity = str(data.seed_for(str(folder.absolute())))
    return wandb.init(project="minopd", name=s.name, id=identity, resume="allow", config=asdict(s), dir=folder)

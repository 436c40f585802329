"""What does a run need besides mathematics: ranks, checkpoints that survive a kill, metrics, pictures, a report?

A run is the folder `runs/NAME/`:

    config.json        the resolved settings
    metrics.jsonl      one object a step (keys: README)
    samples/           grids of pictures with prompts and scores
    checkpoints/       step-NNNNNN/, written under another name and renamed when complete
    report.md          tables and plots of the run
    (TensorBoard events beside them)

Exact resume. All randomness of step s on rank r comes from generators seeded by (seed, stage, s, rank), so no
RNG state has to be saved: weights, averaged weights, optimizer moments and the step number are the whole state.
A run killed at any instant continues from its last complete checkpoint and ends with the same bits on a CPU.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import data
import models
from settings import Settings, SettingsError

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen before)


# --------------------------------------------------------------------------------------------------------- ranks
def start(threads: int) -> tuple[int, int]:
    """Join the process group that torchrun describes, if any: (rank, world size). One process needs no group."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return int(os.environ.get("RANK", "0")), world


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their mean over ranks, in place and in one message. Of gradients, this is DDP.

    It runs once a step, after the last backward, so that single-pass OPD can call backward at every transition
    without a collective for each.
    """
    if not dist.is_initialized() or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def average_numbers(values: dict[str, float]) -> dict[str, float]:
    """Mean over ranks of a dict of numbers that has the same keys everywhere."""
    packed = torch.tensor(list(values.values()), dtype=torch.float64)
    average([packed])
    return dict(zip(values, packed.tolist(), strict=True))


def wait() -> None:
    """Wait until every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------- runs
def optimizers(model: models.FlowModel, s: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, as in F; when the whole base is trained, Muon for the matrices of its blocks.

    Pretraining is the longest stage on a CPU, and Muon (from torch.optim, its updates scaled to AdamW's size so
    that one learning rate serves both) reached AdamW's loss in about half the steps there, in one run of each.
    """
    trained, matrices = model.trainable(), []
    if models.STUDENT not in model.adapters:
        matrices = [p for n, p in model.transformer.named_parameters() if p.ndim == 2 and "transformer_blocks" in n]
    inside = {id(p) for p in matrices}
    others = [p for p in trained if id(p) not in inside]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, s.lr, (0.9, 0.99), weight_decay=s.weight_decay)]
    if matrices:
        muon = torch.optim.Muon(matrices, s.lr, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw")
        found.append(muon)
    return found


class Run:
    """One stage's run: its folder, what it trains, and where it stands."""

    def __init__(self, settings: Settings, model: models.FlowModel, lora: "models.LoraConfig | None" = None):
        self.s, self.model, self.lora = settings, model, lora
        self.rank, self.world = start(settings.threads)
        self.folder = Path(settings.out) / settings.name
        self.step = 0
        self.parameters = model.trainable()
        self.average = [p.detach().clone() for p in self.parameters]  # the EMA, what a checkpoint exports
        self.optimizers = optimizers(model, settings)
        if self.rank == 0:
            self._prepare_folder()
        wait()
        if settings.stage != "merge":  # a merge has no state to go on from, and its teachers may have changed on disk
            self._resume()
        self._board = None

    def generator(self, *what: object) -> torch.Generator:
        """A fresh generator for one purpose at the present step and rank; the whole of a run's randomness."""
        seed = data.seed_for(self.s.seed, self.s.stage, self.s.task, self.step, self.rank, *what)
        return torch.Generator().manual_seed(seed)

    def _prepare_folder(self) -> None:
        resolved = {k: v for k, v in asdict(self.s).items() if k not in ("resume", "dry_run", "config", "threads")}
        file = self.folder / "config.json"
        if not self.s.resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        if file.exists():
            old = json.loads(file.read_text())
            free = ("steps", "save_every", "keep", "eval_prompts", "eval_steps")
            changed = [k for k in resolved if k not in free and old.get(k) != resolved[k]]
            if changed and last_checkpoint(self.folder):
                k = changed[0]
                raise SettingsError(
                    f"{self.folder} was made with --{k.replace('_', '-')} {old.get(k)}, not {resolved[k]}: "
                    "give another --name, or --no-resume to start it anew"
                )
        for stale in (self.folder / "checkpoints").glob(".*"):
            shutil.rmtree(stale)
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(resolved, indent=1) + "\n")

    # -------------------------------------------------------------------------------------------- training steps
    def steps(self, shown: str = "reward") -> Iterator[int]:
        """The steps that are left, with a progress bar that shows the metric `shown`; saves as it goes."""
        bar = tqdm(total=self.s.steps, initial=self.step, desc=self.s.name, disable=self.rank > 0, dynamic_ncols=True)
        while self.step < self.s.steps:
            self._shown, self._bar = shown, bar
            yield self.step
            self.step += 1
            bar.update()
            if self.step % self.s.save_every == 0 or self.step == self.s.steps:
                self.save()
        bar.close()

    def update(self) -> float:
        """Average gradients over ranks, clip, AdamW, EMA: one optimizer update -> the gradient's norm.

        A gradient that is not finite ends the run here, before it reaches the weights.
        """
        missing = [p for p in self.parameters if p.grad is None]
        if missing:
            raise RuntimeError(f"{len(missing)} of {len(self.parameters)} trained tensors have no gradient")
        average([p.grad for p in self.parameters])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.s.grad_norm).item()
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
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return norm

    def log(self, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl and TensorBoard for this step, averaged over ranks."""
        metrics = average_numbers(metrics)
        if self.rank > 0:
            return
        line = {"step": self.step + 1, **{k: float(f"{v:.6g}") for k, v in metrics.items()}}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # half a second, paid only by runs that log

            self._board = SummaryWriter(self.folder)
        for key, value in metrics.items():
            self._board.add_scalar(key, value, self.step + 1)
        if self._shown in metrics:
            self._bar.set_postfix_str(f"{self._shown} {metrics[self._shown]:.3f}")

    # ------------------------------------------------------------------------------------------------ checkpoints
    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / f"step-{self.step:06d}"

    def exported(self) -> "Swap":
        """Context: the model runs with its averaged weights, which are what a checkpoint exports."""
        return Swap(self.parameters, self.average)

    def save(self) -> None:
        """Write step-NNNNNN/ under a hidden name and rename it: a checkpoint is complete or absent."""
        if self.rank == 0:
            hidden = self.checkpoint.with_name("." + self.checkpoint.name)
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
            with self.exported():
                if self.lora is None:
                    models.save_tiny(self.model, hidden)
                else:
                    models.save_adapter(hidden, self.model.adapter_state(), self.lora, self.model)
            state = {"step": self.step, "optimizer": [o.state_dict() for o in self.optimizers]}
            state["weights"] = [p.detach() for p in self.parameters]
            state["average"] = self.average
            torch.save(state, hidden / "training.pt")
            if self.checkpoint.exists():
                shutil.rmtree(self.checkpoint)
            hidden.rename(self.checkpoint)
            for old in sorted((self.folder / "checkpoints").glob("step-*"))[: -self.s.keep]:
                shutil.rmtree(old)
            if self._board:
                self._board.flush()
        wait()

    def _resume(self) -> None:
        last = last_checkpoint(self.folder)
        if last is None:
            if self.rank == 0:
                (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            return
        try:
            state = torch.load(last / "training.pt", weights_only=True)
            for mine, saved in zip(self.parameters, state["weights"], strict=True):
                mine.data.copy_(saved)
            for mine, saved in zip(self.average, state["average"], strict=True):
                mine.copy_(saved)
            for mine, saved in zip(self.optimizers, state["optimizer"], strict=True):
                mine.load_state_dict(saved)
            self.step = state["step"]
        except Exception as fault:
            reason = str(fault).splitlines()[0]
            raise models.ModelError(
                f"{last / 'training.pt'}: cannot resume from it ({reason}); remove {last} to continue from an earlier "
                "checkpoint, or start anew with --no-resume"
            ) from fault
        if self.rank == 0:  # lines written after the checkpoint would appear twice
            file = self.folder / "metrics.jsonl"
            lines = file.read_text().splitlines() if file.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
            write_atomic(file, "".join(line + "\n" for line in kept))
            print(f"{self.s.name}: continues from {last}", file=sys.stderr)


class Swap:
    """Context: `parameters` hold `values` inside and their own again after."""

    def __init__(self, parameters: Sequence[Tensor], values: Sequence[Tensor]):
        self.parameters, self.values = parameters, values

    def __enter__(self) -> None:
        self.own = [p.detach().clone() for p in self.parameters]
        for p, v in zip(self.parameters, self.values, strict=True):
            p.data.copy_(v)

    def __exit__(self, *_: object) -> None:
        for p, v in zip(self.parameters, self.own, strict=True):
            p.data.copy_(v)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None."""
    return max((folder / "checkpoints").glob("step-*"), default=None)


def adapter_folder(path: str) -> Path:
    """A run's folder stands for its last checkpoint; any other path for itself."""
    return last_checkpoint(Path(path)) or Path(path)


def write_atomic(file: Path, text: str) -> None:
    """Write a text file so that a reader, or a kill, sees the old one or the new one."""
    hidden = file.with_name("." + file.name)
    hidden.write_text(text)
    hidden.replace(file)


# ------------------------------------------------------------------------------------------------------ pictures
def save_grid(file: Path, images: Tensor, captions: Sequence[str], columns: int = 8, zoom: int = 5) -> None:
    """A grid of images (N, 3, H, W) in [0, 1], each with a caption (prompt and score) below, wrapped to its width."""
    font = ImageFont.load_default(size=11)
    edge, lines = images.shape[-1] * zoom, 4
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (edge + 8) + 8, rows * (edge + lines * 13 + 10) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 8 + i % columns * (edge + 8), 8 + i // columns * (edge + lines * 13 + 10)
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((edge, edge), Image.Resampling.NEAREST), (x, y))
        pen.rectangle((x - 1, y - 1, x + edge, y + edge), outline=(170, 170, 170))
        for k, line in enumerate(wrap(caption, edge, font)[:lines]):
            pen.text((x, y + edge + 2 + 13 * k), line, fill="black", font=font)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break text into lines no wider than `width` pixels; explicit line breaks stay."""
    lines = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines


def plot_metrics(folder: Path) -> list[Path]:
    """One curve a key of metrics.jsonl -> PNG files under samples/; [] where nothing was logged."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    keys = sorted({k for row in rows for k in row} - {"step", "seconds"})
    if len(rows) < 2:
        return []
    columns = 3
    figure, axes = plt.subplots(
        -(-len(keys) // columns), columns, figsize=(12, 2.6 * -(-len(keys) // columns)), squeeze=False
    )
    for axis, key in zip(axes.flat, keys, strict=False):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_title(key, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(keys) :]:
        axis.axis("off")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.tight_layout()
    target = folder / "samples" / "curves.png"
    figure.savefig(target, dpi=90)
    plt.close(figure)
    return [target]

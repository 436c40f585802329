"""What does a run need besides mathematics: steps that can be stopped and continued, and a record of them?

A run is the folder `runs/NAME/`:

    config.json        the resolved settings, and an identity of what the run reads (harness/identity.py)
    metrics.jsonl      one object a step
    pictures/          test pictures, one file each (harness/drawn.py)
    checkpoints/       step-NNNNNN/, see harness/checkpoints.py
    report.html        one page with all of it; results.json, rows.jsonl and tables, for programs
    (TensorBoard events beside them)

harness/ownership.py says whose the folder is.

All randomness of step s comes from generators that are seeded by (seed, stage, s, what for), never by the rank: a
trajectory's noise belongs to its prompt and its place in the global batch. So two ranks with three prompts each draw
what one rank with six does.
"""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm

from data.batches import seed_for
from data.common import write_atomic
from harness import checkpoints, ownership
from harness.card import model_card
from harness.ranks import any_rank, average_numbers, check_shared, rank_and_world, wait
from harness.weights import Weights
from models.flow import FlowModel
from models.lora import LoraConfig, save_adapter
from settings import Settings

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a scheduler, Ctrl-C, a terminal that is closed


class Stopped(Exception):
    """The run was asked to stop by a signal, has saved its state, and can be continued. code: the exit code."""

    code = 0


class Run:
    """One stage's run: its folder, what it trains, and the step where it stands."""

    def __init__(
        self, settings: Settings, model: FlowModel, lora: LoraConfig | None = None,
        inputs: Mapping[str, str] = {},  # noqa: B006
    ):  # fmt: skip
        """inputs: the identity of what the run reads, by flag (`load.inputs_of`)."""
        self.inputs = inputs
        self.s, self.model, self.lora = settings, model, lora
        self.rank, self.world = rank_and_world()
        self.folder = ownership.of(settings)
        self.lock = ownership.claim(settings)
        self.weights = Weights(model, settings)
        self.asked_to_stop = ""  # the name of the signal that asks
        self.id = ""
        if self.rank == 0:
            self.id = ownership.prepare(settings, inputs)
        check_shared(self.folder)
        wait()
        # A merge has no state to go on from, and its teachers may have changed on disk.
        self.step = 0 if settings.stage == "merge" else checkpoints.resume(self.folder, self.weights)
        self.record = Record(self.folder, settings, self.step, self.id) if self.rank == 0 else None

    def generator(self, *what: int | str, step: int | None = None) -> torch.Generator:
        """A fresh generator for one purpose at a step, the present one if none is named; the same on every rank."""
        step = self.step if step is None else step
        seed = seed_for(self.s.seed, self.s.stage, self.s.task, step, *what)
        return torch.Generator().manual_seed(seed)

    # -------------------------------------------------------------------------------------------- training steps
    def steps(self, shown: str = "reward") -> Iterator[int]:
        """The steps that are left, with a progress bar that shows the metric `shown`; saves as it goes."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            if before[number] != signal.SIG_IGN:  # nohup
                signal.signal(number, self._ask_to_stop)
        s, self.shown = self.s, shown
        self.bar = tqdm(total=s.steps, initial=self.step, desc=s.name, disable=self.rank > 0, dynamic_ncols=True)
        try:
            while self.step < s.steps:
                self.stop_if_asked()
                yield self.step
                self.step += 1
                self._show(self.bar.update)
                if self.step % s.save_every == 0 or self.step == s.steps:
                    self.save()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._show(self.bar.close)
            if self.record:
                self.record.close()

    def update(self) -> float:
        """One optimizer update from the gradients that backward has left -> the gradient's norm."""
        return self.weights.update(self.step)

    def follow(self) -> None:
        """The end of a step's updates: DiffusionNFT's old policy follows the student."""
        self.weights.follow(self.step)

    def drew(self) -> None:
        """See `Weights.drew`."""
        self.weights.drew()

    def log(self, metrics: dict[str, float], histograms: Mapping[str, np.ndarray] | None = None) -> dict[str, float]:
        """Record this step's metrics -> their means over ranks. The histograms are those of rank 0.

        A number that is nan everywhere, such as a reward that was not asked for, is left out.
        """
        if self.model.device.type == "cuda":
            metrics = {**metrics, "memory": torch.cuda.max_memory_allocated() / 2**30}
        metrics = {key: value for key, value in average_numbers(metrics).items() if not np.isnan(value)}
        if self.record:
            self.record.write(self.step + 1, metrics, histograms or {})
            if self.shown in metrics:
                self._show(self.bar.set_postfix_str, f"{self.shown} {metrics[self.shown]:.3f}")
        return metrics

    def history(self, key: str) -> list[float]:
        """A metric's values of the steps that are done, also of those before a resume. Rank 0 writes the file."""
        return [row[key] for row in read_metrics(self.folder) if key in row and row["step"] <= self.step]

    # ------------------------------------------------------------------------------------------------- stopping
    def _ask_to_stop(self, number: int, _: object) -> None:
        self.asked_to_stop = signal.Signals(number).name
        if number == signal.SIGINT:  # who presses Ctrl-C again does not want to wait for a save
            signal.signal(number, signal.default_int_handler)

    def _show(self, show: Callable, *what: str) -> None:
        """Move the progress bar. If nobody reads it any more (`| head`, a terminal that is gone), save and stop."""
        try:
            show(*what)
        except OSError:
            self.asked_to_stop = self.asked_to_stop or "SIGHUP"
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def stop_if_asked(self) -> None:
        """Save and raise `Stopped`, on every rank, once any rank has had one of SIGNALS.

        Called before a step and between its micro-batches, where no weight has been touched yet: what is saved is
        the last whole step, and the one under way is done again on resuming. A scheduler's grace period need not
        be longer than a micro-batch and a save.
        """
        if any_rank(bool(self.asked_to_stop)):  # ranks are told at different moments; they stop at one
            self.save()
            by = self.asked_to_stop or "another rank"
            stopped = Stopped(f"{self.s.name}: stopped by {by}, {self.checkpoint} saved; repeat the command to go on")
            stopped.code = 130 if by == "SIGINT" else 0
            raise stopped

    def fail_together(self, fault: Exception | None, kind: type[Exception]) -> None:
        """If any rank has met a fault, save the last whole step on all of them, and raise: each its own, if any."""
        if any_rank(fault is not None):
            self.save()
            raise fault or kind("another rank has failed; its message says why")

    # ---------------------------------------------------------------------------------------- weights on the disk
    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / f"step-{self.step:06d}"

    def exported(self) -> AbstractContextManager:
        """Context: the model runs with its averaged weights, which are what a checkpoint exports."""
        return self.weights.holding(self.weights.average)

    def old_policy(self, step: int | None = None) -> AbstractContextManager:
        """Context: the model runs with the policy that draws: DiffusionNFT's old one, else the student as it is; with
        --overlap the present step's may be that of a step before."""
        values = self.weights.drawer if step == self.step and self.weights.drawer else self.weights.old
        return self.weights.holding(values) if values else nullcontext()

    def save(self) -> None:
        """Write the checkpoint of the present step. Every rank calls it."""
        checkpoints.save(self.checkpoint, self.export, self.step, *self.weights.state(), self.s.keep)
        if self.record:
            ownership.forget(self.folder)
            self.record.flush()

    def export(self, target: Path) -> None:
        """What others can use: the averaged weights as an adapter or a transformer, and a model card."""
        m = self.model
        with self.exported():
            if self.lora is None:  # gathered from all ranks; filled on rank 0 only
                options = StateDictOptions(full_state_dict=True, cpu_offload=True)
                state = get_model_state_dict(m.transformer, options=options)
                if self.rank == 0:
                    m.save_full(target, state)
            elif self.rank == 0:
                save_adapter(target, m.adapter_state(), self.lora, m.source, m.fingerprint, m.pipeline)
        if self.rank == 0:
            self.write_card(target, {})

    def write_card(self, checkpoint: Path, scores: dict[str, float]) -> None:
        """The model card of a checkpoint, README.md; scores are known once the run has ended."""
        card = model_card(ownership.recorded(self.s), self.record.last, scores, self.step, self.model.pipeline)
        write_atomic(checkpoint / ownership.CARD, card)


class Record:
    """What rank 0 writes of a run's steps: metrics.jsonl, TensorBoard and, if asked, Weights & Biases."""

    def __init__(self, folder: Path, s: Settings, step: int, run_id: str):
        """Lines after `step` are dropped: those steps are done again."""
        self.folder, self.s, self.id = folder, s, run_id
        self.last: dict[str, float] = {}  # the newest line
        self.board = self.wandb = None
        kept = [json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= step]
        if kept:
            write_atomic(folder / "metrics.jsonl", "".join(kept))
        else:
            (folder / "metrics.jsonl").unlink(missing_ok=True)

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        self.last = {k: float(f"{v:.6g}") for k, v in metrics.items()}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **self.last}) + "\n")
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter  # half a second, paid only by runs that log

            self.board = SummaryWriter(self.folder, purge_step=step)  # a step that is done again is shown once
            if self.s.wandb:  # a run that is continued goes on there too
                import wandb

                more = {"id": self.id, "resume": "allow", "dir": self.folder}
                self.wandb = wandb.init(project="minopd", name=self.s.name, config=asdict(self.s), **more)
        for key, value in metrics.items():
            self.board.add_scalar(key, value, step)
        for key, values in histograms.items():
            self.board.add_histogram(key, values, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def flush(self) -> None:
        if self.board:
            self.board.flush()

    def close(self) -> None:
        if self.board:
            self.board.close()
        if self.wandb:  # `wandb.init` of the next stage would hand out this one again
            self.wandb.finish()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl: numbers by name, and "step". One that a kill has cut is left out."""
    file, rows = folder / "metrics.jsonl", []
    for line in file.read_bytes().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int and {*map(type, row.values())} <= {int, float}:
                rows.append(row)
    return rows

"""A run whose checkpoints hold a reward model."""

from pathlib import Path

from huggingface_hub import ModelCardData

from data.common import write_atomic
from harness.run import Run
from models.hub import hub_id
from scorers import vlm_trained
from settings import is_tiny


class RewardRun(Run):
    """A run that trains a judge instead of a flow."""

    def export(self, folder: Path) -> None:
        with self.exported():
            if self.rank == 0:
                vlm_trained.save(self.model, folder, self.s.objective)
        if self.rank == 0:
            self.write_card(folder, {key: value for key, value in self.record.last.items() if key.startswith("held_")})

    def write_card(self, folder: Path, scores: dict[str, float]) -> None:
        base = "" if is_tiny(self.s) else hub_id(self.s.model)
        front = ModelCardData(base_model=base or None, tags=["reward-model"])
        equation = {"pointwise": 11, "pairwise": 10}[self.s.objective]
        lines = [
            "---", front.to_yaml(), "---", "", "# A reward model", "",
            f"Objective: {self.s.objective} (Qwen-Image-2.0-RL, Eq. {equation}); {self.step} steps.", "",
            *(["Agreement with people on held-out prompts:", ""] if scores else []),
            *(f"- {key}: {value:.4g}" for key, value in scores.items()), "",
        ]  # fmt: skip
        write_atomic(folder / "README.md", "\n".join(lines))

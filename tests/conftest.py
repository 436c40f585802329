"""What the tests of whole runs share: a base model small enough to train in a blink, and three teachers for it.

Nothing heavy is imported at the top: the tests of the equation files must not pay for diffusers.
"""

from types import SimpleNamespace

import pytest

TASKS = ("composition", "text", "quality")

# Three steps of sampling, six images a batch: a training step takes milliseconds and still runs every line.
SMALL = [
    *("--prompts-per-step", "3", "--group-size", "2", "--batch-size", "3", "--sft-images", "6", "--rank", "4"),
    *("--num-steps", "3", "--window", "0:2", "--train-steps", "first", "--train-count", "2", "--alpha", "8"),
    *("--train-prompts", "12", "--eval-prompts", "6", "--eval-steps", "2", "--threads", "1"),
]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A random base (`base`), a random adapter a task (`teachers`), and the flags that choose them (`flags`)."""
    import torch

    import models

    root = tmp_path_factory.mktemp("world")
    models.save_tiny(models.new_tiny(0, width=32, layers=1), root / "base")
    teachers = {}
    for number, task in enumerate(TASKS):
        teachers[task] = root / f"teacher-{task}"
        save_random_adapter(root / "base", teachers[task], seed=number)
    pairs = [f"{task}={path}" for task, path in teachers.items()]
    flags = ["--model", str(root / "base"), "--teachers", *pairs, *SMALL]
    torch.set_num_threads(1)
    return SimpleNamespace(root=root, base=root / "base", teachers=teachers, flags=flags)


def save_random_adapter(base, folder, seed, rank=4):
    """An adapter whose B factors are not zero: it draws other pictures than the base and than any other seed's."""
    import torch

    import models

    model, config = models.load_tiny(base), models.lora_config(rank, 2.0 * rank)
    model.add_adapter(models.STUDENT, config)
    rng = torch.Generator().manual_seed(seed)
    state = {k: 0.2 * torch.randn(v.shape, generator=rng) for k, v in model.adapter_state().items()}
    models.save_adapter(folder, state, config, model)


def same(a, b):
    """Bitwise equality of nested states."""
    import torch

    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

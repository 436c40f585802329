"""A run of two tensors in place of a model: what a run does with its folder and its weights, in milliseconds."""

import safetensors.torch
import torch
from torch import nn

from harness import cli
from harness.run import Run

START = {"vector": [1.0, -2.0], "matrix": [[3.0, 0.5, -1.0]]}
GRADS = [  # three steps; the norm of the second is 13 and of the third 0.13: one is clipped at 1, one is not
    {"vector": [0.3, -0.4], "matrix": [[0.1, 0.2, 0.0]]},
    {"vector": [3.0, 4.0], "matrix": [[12.0, 0.0, 0.0]]},
    {"vector": [0.03, 0.0], "matrix": [[0.04, 0.0, 0.12]]},
]
NFT = {"stage": "nft", "task": "text"}  # the stage with an old policy (Q Eq. 7)


class Pair:
    """Stands for a model with a student of its own: two trained tensors, of other shapes."""

    device, pipeline = torch.device("cpu"), ""

    def __init__(self):
        self.transformer = nn.Module()
        for name, values in START.items():
            self.transformer.register_parameter(name, nn.Parameter(torch.tensor(values)))

    def trainable(self):
        return dict(self.transformer.named_parameters())

    def save_full(self, folder, state):
        safetensors.torch.save_file(state, folder / "exported.safetensors")


def toy_in(folder, **changes):
    """A run of the two tensors."""
    plain = {
        "preset": "tiny", "name": "toy", "out": str(folder), "parameters": "full", "steps": 3,
        "save_every": 1, "lr": 0.1, "decay": False,
    }  # fmt: skip
    return Run(cli.resolve({**plain, **changes}), Pair())


def set_gradients(run, step):
    for name, p in run.weights.parameters.items():
        p.grad = torch.tensor(GRADS[step][name])


def train(run):
    """The three steps, one metric each; the gradient leans on the weights, so a lost state would show."""
    for step in run.steps("loss"):
        run.stop_if_asked()
        set_gradients(run, step % 3)
        for p in run.weights.parameters.values():
            p.grad += 0.1 * p.detach()
        run.log({"loss": 0.5 + step, "grad_norm": run.update()})
        run.follow()


def flat(tensors):
    """{"vector": ..., "matrix": ...} as one array, the vector first."""
    return torch.cat([torch.as_tensor(tensors[name]).detach().flatten() for name in START]).double().numpy()

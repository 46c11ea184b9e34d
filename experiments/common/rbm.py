"""Restricted Boltzmann machines, and the pre-training of a deep belief network by a stack of them."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common.data import Images
from common.training import Precision
from nac_gpu.files.atomic import atomically


@dataclass(frozen=True)
class RbmRecipe:
    """How a restricted Boltzmann machine is trained: CD-1 as in Hinton & Salakhutdinov (2006).

    Attributes:
        epochs: passes over the data.
        learning_rate: for weights and biases; falls linearly to zero in the last half of the steps.
        weight_decay: on weights.
        early_momentum: momentum in the first five epochs.
        momentum: momentum after them.
    """

    epochs: int
    learning_rate: float = 0.1
    weight_decay: float = 2e-4
    batch_size: int = 128
    early_momentum: float = 0.5
    momentum: float = 0.9

    def rate(self, progress: float) -> float:
        """The learning rate when a share `progress` of the steps is done."""
        return self.learning_rate * min(1.0, 2 - 2 * progress)


class Rbm:
    """A restricted Boltzmann machine of binary units.

    Attributes:
        parameters: weight [hidden, visible], hidden bias [hidden], visible bias [visible], float32.
        velocity: the last update of each.
    """

    def __init__(self, visible: int, hidden: int, device: torch.device, generator: torch.Generator) -> None:
        """Small normal weights (deviation 0.01), zero biases."""
        weight = 0.01 * torch.randn(hidden, visible, generator=generator)
        self.parameters = [weight.to(device), torch.zeros(hidden, device=device), torch.zeros(visible, device=device)]
        self.velocity = [torch.zeros_like(parameter) for parameter in self.parameters]

    def up(self, visible: Tensor) -> Tensor:
        """Probabilities of the hidden units [n, hidden] given visible ones [n, visible]."""
        return torch.sigmoid(F.linear(visible, self.parameters[0], self.parameters[1]))

    def down(self, hidden: Tensor) -> Tensor:
        """Probabilities of the visible units [n, visible] given hidden ones [n, hidden]."""
        return torch.sigmoid(F.linear(hidden, self.parameters[0].t(), self.parameters[2]))

    def step(self, data: Tensor, rate: float, momentum: float, weight_decay: float) -> Tensor:
        """One step of contrastive divergence on data [n, visible]: probabilities are used for all but the sample.

        Returns:
            The mean squared error of the reconstruction, a scalar.
        """
        hidden = self.up(data)
        sample = (torch.rand_like(hidden, dtype=torch.float32) < hidden).to(hidden.dtype)
        reconstruction = self.down(sample)
        again = self.up(reconstruction)
        gradients = (
            hidden.t() @ data - again.t() @ reconstruction,
            (hidden - again).sum(0, dtype=torch.float32),
            (data - reconstruction).sum(0, dtype=torch.float32),
        )
        decays = (weight_decay, 0.0, 0.0)
        for parameter, velocity, gradient, decay in zip(self.parameters, self.velocity, gradients, decays, strict=True):
            velocity.mul_(momentum).add_(gradient, alpha=rate / len(data)).sub_(parameter, alpha=rate * decay)
            parameter.add_(velocity)
        return (data - reconstruction).square().mean()


def train_rbm(
    rbm: Rbm, data: Tensor, recipe: RbmRecipe, precision: Precision, *, seed: int, label: str, checkpoint: Path
) -> None:
    """Train a machine in place on data [n, visible] in [0, 1]; resumable after every epoch."""
    steps, done = -(-len(data) // recipe.batch_size), 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=data.device, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise ValueError(f"{checkpoint} was made with {state['recipe']}, not {asdict(recipe)}: remove it")
        rbm.parameters, rbm.velocity, done = state["parameters"], state["velocity"], state["epochs"]
    for epoch in range(done, recipe.epochs):
        torch.manual_seed(seed * 1000 + epoch)  # an epoch is the same whether or not the run was resumed
        momentum = recipe.early_momentum if epoch < 5 else recipe.momentum
        errors = []
        batches = torch.randperm(len(data)).to(data.device).split(recipe.batch_size)
        for step, batch in enumerate(tqdm(batches, desc=f"{label} {epoch + 1}/{recipe.epochs}", leave=False)):
            rate = recipe.rate((epoch * steps + step) / (recipe.epochs * steps))
            with precision():
                errors.append(rbm.step(data[batch], rate, momentum, recipe.weight_decay))
        tqdm.write(f"{label}: epoch {epoch + 1}/{recipe.epochs}, reconstruction error {torch.stack(errors).mean():.4f}")
        state = {"parameters": rbm.parameters, "velocity": rbm.velocity, "epochs": epoch + 1, "recipe": asdict(recipe)}
        with atomically(checkpoint) as partial:
            torch.save(state, partial)


@torch.no_grad()
def pretrain(
    model: nn.Sequential,
    images: Images,
    recipe: RbmRecipe,
    precision: Precision,
    *,
    seed: int,
    label: str,
    folder: Path,
) -> None:
    """Give the hidden layers of a `dbn()` the weights of a stack of machines, each trained on the one below."""
    precision.place(model)
    data = images.pixels.to(precision.device).flatten(1).float() / 255
    hidden = [layer for layer in model if isinstance(layer, nn.Linear)][:-1]
    for level, layer in enumerate(hidden, 1):
        rbm = Rbm(layer.in_features, layer.out_features, precision.device, torch.Generator().manual_seed(seed))
        rbm_label = f"{label}, machine {level}"
        train_rbm(rbm, data, recipe, precision, seed=seed, label=rbm_label, checkpoint=folder / f"rbm{level}.pt")
        layer.weight.copy_(rbm.parameters[0])
        layer.bias.copy_(rbm.parameters[1])
        if layer is not hidden[-1]:
            data = torch.cat([rbm.up(part) for part in data.split(5000)])

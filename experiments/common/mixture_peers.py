"""Methods of others that leave fewer experts: REAP, HC-SMoE, REAM, and pruning by frequency or by chance.

All are our reading of the papers, not their code, for mixtures of `transformers`' Mixtral: a router that picks some
experts for each token, and experts of two matrices each that are stacked in tensors. They need scipy.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.language_data import Batch, spread

Choice = Literal["saliency", "frequency", "random", "outputs", "centres"]
#: Experts that become one, by their numbers; the first lends its place in the router.
Groups = list[list[int]]
_ALIGNED_ON = 4096  # tokens, on which neurons are compared


@dataclass(frozen=True)
class Reduction:
    """A method that leaves fewer experts.

    Attributes:
        choice: which experts stay, or become one:
            "saliency": those stay whose outputs have, over the tokens that were given to them, the largest mean of
            norm times router's weight (REAP, Lasby et al. 2025);
            "frequency": those stay that were given the most tokens;
            "random": any stay;
            "outputs": clusters of the experts' mean outputs over all tokens, by average linkage, become one
            (HC-SMoE, Chen et al. 2025). Weights are averaged, in proportion to how many tokens an expert was given,
            and the router is as it was: what it gives to a member goes to the merged expert;
            "centres": the experts of the largest saliency are centres, and others join them (REAM, Jha et al. 2026).
            From the most salient centre to the least, each takes those that are most like it until its group is full.
            The likeness is the mean of two cosines: of mean outputs weighted by the router, and of the router's
            logits over all tokens. The neurons of the others are put into the order that is nearest to the centre's,
            by their activations and weights; then weights are averaged, in proportion to saliency. The router keeps
            the centres' rows. Layers are merged one after another, each on what the merged ones before it compute.
        size: how many experts may be in a group of a centre. The paper has 16 of 128. With fewer experts in all, the
            first centre takes all that are left.
    """

    choice: Choice
    size: int = 16


PEERS = {
    "REAP": Reduction("saliency"),
    "HC-SMoE": Reduction("outputs"),
    "REAM": Reduction("centres"),
    "REAM, pairs": Reduction("centres", size=2),
    "frequency": Reduction("frequency"),
    "random": Reduction("random"),
}


class Redirected(nn.Module):
    """A router whose experts have become fewer: what it gives to one goes to the one that it is in now."""

    def __init__(self, router: nn.Module, target: Tensor) -> None:
        """Wrap it.

        Args:
            router: gives logits, the weights of the picked experts, and their numbers.
            target: new numbers of the experts, by their old ones.
        """
        super().__init__()
        self.router = router
        self.register_buffer("target", target)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The router's answer with the new numbers."""
        logits, weights, picked = self.router(hidden)
        return logits, weights, self.get_buffer("target")[picked]


def mixtures(model: Any) -> list[Any]:
    """The mixtures of all layers: modules with a router `gate`, and with `experts`."""
    return [layer.mlp for layer in model.model.layers]


@torch.no_grad()
def reads(model: nn.Module, modules: Sequence[nn.Module], batches: Sequence[Batch]) -> list[Tensor]:
    """What modules of a model are given by the calibration inputs, [tokens, channels] each."""
    found: list[list[Tensor]] = [[] for _ in modules]

    def look(parts: list[Tensor]) -> Callable[..., None]:
        return lambda _, inputs: parts.append(inputs[0].flatten(0, -2))

    hooks = [module.register_forward_pre_hook(look(parts)) for module, parts in zip(modules, found, strict=True)]
    for batch in batches:
        model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in found]


def neurons(mixture: Any, expert: int, read: Tensor) -> Tensor:
    """The activations of an expert's neurons, [tokens, neurons]."""
    gate, up = functional.linear(read, mixture.experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return mixture.experts.act_fn(gate) * up


class Seen:
    """What calibration tokens show of a mixture.

    Attributes:
        mixture: it.
        read: what it is given, [tokens, channels].
        logits: the router's, [tokens, experts].
        frequency: how many tokens each expert is given, [experts].
        saliency: mean over these tokens of the norm of its output times the router's weight, [experts].
        outputs: its mean output over all tokens, [experts, channels].
        weighted: the same, each output times the router's probability.
    """

    @torch.no_grad()
    def __init__(self, mixture: Any, read: Tensor) -> None:
        """Run all experts on all tokens."""
        self.mixture, self.read = mixture, read
        self.logits, weights, picked = mixture.gate(read)
        count = self.logits.shape[1]
        used = torch.zeros_like(self.logits).scatter(1, picked, weights)
        given = torch.zeros_like(self.logits, dtype=torch.bool).scatter(1, picked, True)
        probability = self.logits.softmax(1)
        self.frequency = given.sum(0).double()
        saliency, outputs, weighted = [], [], []
        for expert in range(count):
            output = functional.linear(neurons(mixture, expert, read), mixture.experts.down_proj[expert])
            saliency.append((output.norm(dim=1) * used[:, expert]).sum().double())
            outputs.append(output.mean(0))
            weighted.append((output * probability[:, expert, None]).mean(0))
        self.saliency = torch.stack(saliency) / self.frequency.clamp_min(1)
        self.outputs, self.weighted = torch.stack(outputs), torch.stack(weighted)

    def likeness(self) -> Tensor:
        """How like each other experts are, [experts, experts]: the mean of the cosines that REAM looks at."""
        first, second = (functional.normalize(rows.double(), dim=1) for rows in (self.weighted, self.logits.T))
        return (first @ first.T + second @ second.T) / 2


def groups_of(seen: Seen, method: Reduction, count: int, generator: torch.Generator) -> Groups:
    """The experts that stay, each alone or with those that are merged into it; ordered by the first of each group."""
    total = len(seen.saliency)
    if method.choice == "outputs":
        from scipy.cluster.hierarchy import cut_tree, linkage

        labels = cut_tree(linkage(seen.outputs.double().numpy(), "average"), count).flatten().tolist()
        groups = [[expert for expert in range(total) if labels[expert] == label] for label in range(count)]
    elif method.choice == "random":
        groups = [[expert] for expert in torch.randperm(total, generator=generator)[:count].tolist()]
    else:
        scores = seen.frequency if method.choice == "frequency" else seen.saliency
        order = scores.argsort(descending=True, stable=True).tolist()
        groups = [[expert] for expert in order[:count]]
        if method.choice == "centres":
            _join(groups, order[count:], seen.likeness(), method.size)
    return sorted(groups)


def _join(groups: Groups, others: list[int], likeness: Tensor, size: int) -> None:
    """Put all other experts into the groups, in place.

    Raises:
        ValueError: the groups are too small for all of them.
    """
    left = set(others)
    for group in groups:
        near = sorted(left, key=lambda expert: -float(likeness[group[0], expert]))
        group += near[: size - 1]
        left -= set(group)
    if left:
        raise ValueError(f"{len(groups)} groups of {size} experts, expected room for {len(groups) + len(others)}")


def order_like(seen: Seen, centre: int, other: int) -> Tensor:
    """The order of an expert's neurons in which they are nearest to a centre's, by activations and by weights."""
    from scipy.optimize import linear_sum_assignment

    read, experts = spread(seen.read, _ALIGNED_ON), seen.mixture.experts

    def points(expert: int) -> tuple[Tensor, Tensor]:
        columns = torch.cat([*experts.gate_up_proj[expert].chunk(2), experts.down_proj[expert].T], dim=1)
        return neurons(seen.mixture, expert, read).T, columns

    cost = torch.zeros(())
    for first, second in zip(points(centre), points(other), strict=True):
        cost = cost + torch.cdist(functional.normalize(first, dim=1), functional.normalize(second, dim=1))
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def averaged(seen: Seen, group: Sequence[int], weights: Tensor, aligned: bool) -> tuple[Tensor, Tensor]:
    """The two matrices of a merged expert.

    Args:
        seen: of the mixture.
        group: its members; the first is the centre.
        weights: of all experts of the mixture.
        aligned: neurons are put into the centre's order.
    """
    experts, into, out = seen.mixture.experts, [], []
    for expert in group:
        order = torch.arange(experts.down_proj.shape[2])
        if aligned and expert != group[0]:
            order = order_like(seen, group[0], expert)
        into.append(experts.gate_up_proj[expert].unflatten(0, (2, -1))[:, order].flatten(0, 1))
        out.append(experts.down_proj[expert][:, order])
    own = weights[list(group)]
    shares = (own / own.sum() if own.sum() > 0 else torch.full_like(own, 1 / len(own))).to(into[0].dtype)
    first, second = (torch.einsum("e,eij->ij", shares, torch.stack(parts)) for parts in (into, out))
    return first, second


def reduce_one(seen: Seen, method: Reduction, count: int, generator: torch.Generator) -> None:
    """Leave so many experts of a mixture, in place."""
    mixture, groups = seen.mixture, groups_of(seen, method, count, generator)
    weights = seen.saliency if method.choice == "centres" else seen.frequency
    made = [averaged(seen, group, weights, aligned=method.choice == "centres") for group in groups]
    experts, router = mixture.experts, mixture.gate
    experts.gate_up_proj, experts.down_proj = (nn.Parameter(torch.stack(parts)) for parts in zip(*made, strict=True))
    experts.num_experts = count
    if method.choice == "outputs":
        target = torch.tensor([next(n for n, group in enumerate(groups) if e in group) for e in range(len(weights))])
        mixture.gate = Redirected(router, target)
    else:
        router.weight = nn.Parameter(router.weight[[group[0] for group in groups]].clone())
        router.num_experts = count


@torch.no_grad()
def reduced(model: nn.Module, method: Reduction, count: int, batches: Sequence[Batch], seed: int = 0) -> nn.Module:
    """A copy of a model with so many experts in each layer.

    Args:
        model: a causal language model with mixtures as `transformers`' Mixtral has them; not changed.
        method: which.
        count: experts that stay, at least as many as the router picks.
        batches: the calibration inputs.
        seed: of random choices.
    """
    small: Any = copy.deepcopy(model)
    all_of_them, generator = mixtures(small), torch.Generator().manual_seed(seed)
    if method.choice == "centres":
        for mixture in all_of_them:
            (read,) = reads(small, [mixture], batches)
            reduce_one(Seen(mixture, read), method, count, generator)
    else:
        for mixture, read in zip(all_of_them, reads(small, all_of_them, batches), strict=True):
            reduce_one(Seen(mixture, read), method, count, generator)
    small.config.num_local_experts = count
    return small.requires_grad_(False)

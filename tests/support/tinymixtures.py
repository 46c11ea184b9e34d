"""Small mixtures of experts, with and without experts that are alike."""

import torch
from torch import Tensor, nn

WIDTH, HIDDEN = 10, 14


class Listed(nn.Module):
    """Experts are modules; each sees its tokens only."""

    def __init__(self, count: int = 6, picks: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(6, WIDTH), nn.Linear(WIDTH, count, bias=bias)
        self.experts = nn.ModuleList(self.expert() for _ in range(count))
        self.head = nn.Linear(8, 4)
        self.num_experts, self.picks = count, picks

    def expert(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 8))

    def answer(self, x: Tensor, number: int) -> Tensor:
        return self.experts[number](x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh().flatten(0, 1)
        scores, chosen = self.router(x).topk(self.picks)
        y = x.new_zeros(len(x), self.head.in_features)
        for number in range(self.num_experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                y = y.index_add(0, rows, self.answer(x[rows], number) * scores.softmax(-1)[rows, places, None])
        return self.head(y)


class Stacked(Listed):
    """Experts are rows of common tensors, in the layout of gated language models with biases."""

    def __init__(self, count: int = 6, picks: int = 1) -> None:
        super().__init__(count, picks)
        del self.experts
        self.gate_up = nn.Parameter(torch.randn(count, WIDTH, 2 * HIDDEN) * 0.4)
        self.gate_up_bias = nn.Parameter(torch.randn(count, 2 * HIDDEN))
        self.down = nn.Parameter(torch.randn(count, HIDDEN, 8) * 0.4)
        self.down_bias = nn.Parameter(torch.randn(count, 8))

    def answer(self, x: Tensor, number: int) -> Tensor:
        gate, up = (x @ self.gate_up[number] + self.gate_up_bias[number]).chunk(2, -1)
        return (torch.sigmoid(gate) * up) @ self.down[number] + self.down_bias[number]


class Deep(Listed):
    """Experts of two hidden layers."""

    def expert(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 8))


CLASSES = {"listed": Listed, "stacked": Stacked}
X = torch.randn(4, 16, 6, generator=torch.Generator().manual_seed(1))


def made(kind: str, **how: int) -> nn.Module:
    torch.manual_seed(0)
    return CLASSES[kind](**how).eval()


def listed() -> nn.Module:
    """For the command line: `tinymixtures:listed`."""
    return made("listed")


def with_copies(kind: str, noise: float = 0.0) -> nn.Module:
    """Experts 3, 4, 5 are experts 1, 2, 0 with their neurons in another order, and the router knows no difference."""
    model = made(kind)
    order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)

    def like(tensor: Tensor) -> Tensor:
        return tensor * (1 + noise * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for copied, number in ((3, 1), (4, 2), (5, 0)):
            for tensor in (model.router.weight, model.router.bias):
                tensor[copied] = like(tensor[number])
            if kind == "listed":
                first, _, last = model.experts[number]
                model.experts[copied][0].weight.copy_(like(first.weight[order]))
                model.experts[copied][0].bias.copy_(like(first.bias[order]))
                model.experts[copied][2].weight.copy_(like(last.weight[:, order]))
                model.experts[copied][2].bias.copy_(like(last.bias))
            else:
                both = torch.cat([order, order + HIDDEN])
                model.gate_up[copied] = like(model.gate_up[number][:, both])
                model.gate_up_bias[copied] = like(model.gate_up_bias[number][both])
                model.down[copied] = like(model.down[number][order])
                model.down_bias[copied] = like(model.down_bias[number])
    return model

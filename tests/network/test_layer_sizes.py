"""What modules and configurations say about their sizes after a compression."""

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nac_gpu as nac
from common.architectures import ARCHITECTURES
from common.checks import training_step
from nac_gpu.distributed.ranks import ALONE
from nac_gpu.network.comparing import relative_error
from nac_gpu.network.reaching import tensors_in
from nac_gpu.planning.latency import Stopwatch
from nac_gpu.planning.prepare import plan_for
from nac_gpu.planning.request import Request
from nac_gpu.planning.taking import take
from nac_gpu.testing import floating_outputs, randomise

pytestmark = pytest.mark.usefixtures("short_dreams")


class Config(SimpleNamespace):
    """As of Hugging Face: one number for all layers."""

    def to_dict(self) -> dict[str, object]:
        return dict(vars(self))


class Block(nn.Module):
    """Attention and two linear layers, with the sizes kept in the manner of several libraries."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.inner_dim = config.intermediate_size
        self.norm = nn.LayerNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.up, self.down = (
            nn.Linear(config.hidden_size, self.inner_dim),
            nn.Linear(self.inner_dim, config.hidden_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim)
        x = x + self.out(y)
        return x + self.down(self.up(x).relu().view(b * t, self.inner_dim)).view(b, t, -1)


def model(hidden: int = 12, heads: int = 4, intermediate: int = 20) -> nn.Module:
    torch.manual_seed(0)
    config = Config(hidden_size=hidden, num_attention_heads=heads, intermediate_size=intermediate, layers=2)
    made = nn.Sequential(nn.Linear(5, hidden), Block(config), Block(config), nn.LayerNorm(hidden), nn.Linear(hidden, 3))
    made.config = config  # type: ignore[assignment]
    return made.eval()


INPUTS = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))


def test_attributes_of_other_peoples_modules_follow() -> None:
    """Heads follow by name; a size that the code asks for is found by trying."""
    whole = model()
    plan = nac.plan(whole, INPUTS, width=0.5)
    assert [(g.name, g.before, g.after, g.units) for g in plan.groups] == [
        ("1.qkv", 4, 2, True),
        ("1.up", 20, 10, False),
        ("2.qkv", 4, 2, True),
        ("2.up", 20, 10, False),
    ]
    small = nac.compress(whole, INPUTS, plan)
    for block in (small[1], small[2]):  # type: ignore[index]
        assert (block.num_heads, block.head_dim, block.inner_dim) == (2, 3, 10)
        assert (block.qkv.out_features, block.out.in_features) == (18, 6)
    assert whole[1].num_heads == 4  # type: ignore[index]


def test_a_configuration_says_what_all_layers_have_in_common() -> None:
    whole = model()
    small = nac.compress(whole, INPUTS, width={"1.qkv": 2, "2.qkv": 2, "1.up": 7, "2.up": 9})
    assert small.config is small[1].config  # type: ignore[index]
    assert vars(small.config) == {  # type: ignore[arg-type]
        "hidden_size": 12,
        "num_attention_heads": 2,
        "head_dim": 3,
        "intermediate_size": 20,  # the layers differ: one number cannot say it
        "layers": 2,
    }
    assert vars(whole.config)["num_attention_heads"] == 4  # type: ignore[arg-type]


class ByConfiguration(nn.Module):
    """A block whose code asks the configuration for the number of heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.norm = config, nn.LayerNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        (b, t, _), heads = x.shape, self.config.num_attention_heads
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, heads, 3).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ScaledByConfiguration(ByConfiguration):
    """A block that knows its number of heads, and takes the size of a head from the configuration."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.num_heads = config.num_attention_heads

    def forward(self, x: Tensor) -> Tensor:
        size = self.config.hidden_size / self.config.num_attention_heads
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return x + self.out(((q @ k.mT / size).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_configuration_from_which_more_is_computed_is_left() -> None:
    torch.manual_seed(0)
    config = Config(hidden_size=12, num_attention_heads=4)
    whole = nn.Sequential(nn.Linear(5, 12), ScaledByConfiguration(config), nn.Linear(12, 3)).eval()
    plan = nac.plan(whole, INPUTS, width=0.5)
    assert [(group.name, group.before, group.after) for group in plan.groups] == [("1.qkv", 4, 2)]
    assert "1.config.num_attention_heads was left: the code computes something else from it, too" in plan.changes
    small = nac.compress(whole, INPUTS, plan, calibration="none")
    assert (small[1].num_heads, small[1].config.num_attention_heads) == (2, 4)  # type: ignore[index, union-attr]
    assert nac.testing.check_copies(whole, INPUTS).error < 1e-8


def test_a_network_that_asks_its_configuration_runs_in_all_steps() -> None:
    torch.manual_seed(0)
    config = Config(hidden_size=12, num_attention_heads=4)
    whole = nn.Sequential(nn.Linear(5, 12), ByConfiguration(config), nn.Linear(12, 3)).eval()
    assert nac.testing.check_copies(whole, INPUTS).error < 1e-8
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as one that says that a step was left out
        small = nac.compress(whole, INPUTS, flops=0.8, calibration=[INPUTS] * 4, refine=3)
    assert small[1].config.num_attention_heads < 4  # type: ignore[index, union-attr]
    assert small(INPUTS).shape == (2, 6, 3)
    assert config.num_attention_heads == 4
    choices = plan_for(take(whole, INPUTS), Request(width=0.5)).choices
    assert Stopwatch(whole, INPUTS, ALONE).measure(choices)[0] > 0


ROUND = [
    *("unet", "resnext", "shufflenet", "squeeze_excitation", "inverted_residual", "group_norm", "instance_norm"),
    *("transformer_encoder", "llama", "lstm_bidirectional", "gru", "wavenet", "dcgan", "weight_norm", "dict_output"),
]


@pytest.mark.filterwarnings("ignore:The tensor attributes self.layers._flat_weights")
@pytest.mark.parametrize("name", ROUND)
def test_the_result_can_do_what_modules_can(name: str) -> None:
    torch.manual_seed(0)
    entry = ARCHITECTURES[name]
    whole, inputs = randomise(entry.build()).eval(), entry.inputs()
    small = nac.compress(whole, inputs, width=0.5, method="random")
    expected = floating_outputs(small, inputs)
    assert repr(small).count("\n") == repr(whole).count("\n") or name == "weight_norm"
    copied = copy.deepcopy(small)
    for parameter in copied.parameters():
        nn.init.zeros_(parameter)
    copied.load_state_dict(small.state_dict())
    assert relative_error(floating_outputs(copied, inputs), expected) == 0
    exported = torch.export.export(small, *_arguments(inputs))
    arguments, named = _arguments(inputs)
    with torch.no_grad():
        found = [
            t for t in tensors_in(exported.module(check_guards=False)(*arguments, **named)) if t.is_floating_point()
        ]
    assert relative_error(found, expected) < 1e-5
    training_step(copied, inputs)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    return ((), dict(inputs)) if isinstance(inputs, dict) else (tuple(inputs), {})


@pytest.mark.parametrize("build", [model], ids=["blocks"])
def test_the_result_compiles(build: Callable[[], nn.Module]) -> None:
    small = nac.compress(build(), INPUTS, width=0.5)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error([compiled(INPUTS)], [small(INPUTS)]) < 1e-6

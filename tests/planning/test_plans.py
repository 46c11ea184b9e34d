"""Plans: widths, what they say, JSON, refusals."""

import pytest
import torch
from networks import network
from torch import Tensor, nn

import nac_gpu as nac

pytestmark = pytest.mark.usefixtures("short_dreams")


def test_counts_of_the_papers_networks() -> None:
    from common.models import dbn, mnist_cnn, vgg16, vgg19

    image = torch.zeros(1, 3, 32, 32)
    assert nac.cost(vgg16(10), image).parameters == 33_646_666
    assert nac.cost(vgg16(10), image).flops == pytest.approx(6.65e8, rel=2e-3)
    assert nac.cost(vgg16(100), image).parameters == 34_015_396
    assert nac.cost(vgg19(10), image).parameters == pytest.approx(20.04e6, rel=1e-3)
    digit = torch.zeros(1, 1, 28, 28)
    assert nac.cost(dbn(), digit).parameters == 1_665_010
    assert nac.cost(mnist_cnn(), digit).parameters == 151_920


@pytest.mark.parametrize(("widths", "parameters"), [((300, 300, 1000), 636_810), ((200, 100, 100), 188_210)])
def test_compressed_sizes_of_the_dbn(widths: tuple[int, int, int], parameters: int) -> None:
    model, inputs = network("dbn")
    plan = nac.plan(model, inputs, width=dict(zip(("1", "3", "5"), widths, strict=True)))
    assert plan.before.parameters == 1_665_010
    assert plan.after.parameters == parameters
    assert sum(p.numel() for p in nac.compress(model, inputs, plan, method="random").parameters()) == parameters


def test_the_papers_budget_for_vgg16() -> None:
    from common.models import vgg16
    from common.vgg import paper_widths

    model = vgg16(10)
    inputs = torch.zeros(1, 3, 32, 32)
    plan = nac.plan(model, inputs, width=paper_widths(model))
    assert plan.after.parameters <= 2.37e6
    assert plan.after.flops <= 3.72e8


def test_one_share_for_all() -> None:
    plan = nac.plan(*network("cnn"), width=0.5)
    assert [(g.before, g.after) for g in plan.groups] == [(6, 3), (6, 3), (16, 8), (16, 8), (120, 60), (120, 60)]


def test_widths_by_name_pattern_count_and_share() -> None:
    model, inputs = network("vgg19")
    plan = nac.plan(model, inputs, width={"features.0": 5, "features.4*": 0.25})
    after = {g.name: g.after for g in plan.groups if g.after != g.before}
    assert after == {"features.0": 5, "features.40": 16, "features.43": 16, "features.46": 16, "features.49": 16}


def test_the_width_of_a_shared_group_can_be_given_by_any_of_its_layers() -> None:
    plan = nac.plan(*network("residual"), width={"block": 4})
    assert plan.widths == {"stem": 4}
    with pytest.raises(ValueError, match=r"stem and block share their neurons \(group stem\).*got 3 and 4"):
        nac.plan(*network("residual"), width={"stem": 3, "block": 4})


def test_groups_of_one_layer_are_told_apart_by_name() -> None:
    model, inputs = network("split")
    plan = nac.plan(model, inputs, width={"make": 4, "make#2": 3})
    assert plan.widths == {"make": 4, "make#2": 3}
    small = nac.compress(model, inputs, plan)
    assert (small.make.out_features, small.a.in_features, small.b.in_features) == (7, 4, 3)


def test_it_prints_as_a_table_with_what_is_left_alone() -> None:
    text = str(nac.plan(*network("cnn"), width={"2": 5, "5": 12, "7": 12, "10": 80, "14": 60}))
    assert "group  neurons    kept  parameters       after  layers" in text
    # 120 x 16 x 9 + 120 and 120 columns of 9 x 120 weights; then 80 x 12 x 9 + 80 and 80 columns of 9 x 60
    assert "10         120      80     147,000      51,920  10" in text
    assert "left alone: 16 (10): model output" in text
    assert "parameters: 151,920 -> 54,785 (36.1 %)" in text


class Deep(nn.Module):
    """Blocks of two layers each, with a stream that is normalised."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        parts = [nn.ModuleDict({"up": nn.Linear(8, 24), "down": nn.Linear(24, 8)}) for _ in range(blocks)]
        self.blocks = nn.ModuleList(parts)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["down"](block["up"](self.norm(x)).relu())
        return x


def test_blocks_of_the_same_kind_are_one_line() -> None:
    inputs = torch.zeros(2, 8)
    few = nac.plan(Deep(4), inputs, width=0.5)
    assert str(few) == few.detailed()
    plan = nac.plan(Deep(12), inputs, width={"blocks.[0-24-9].up": 12, "blocks.1?.up": 9})
    text, detailed = str(plan).splitlines(), plan.detailed().splitlines()
    assert text[0].split() == detailed[0].split() == "group neurons kept parameters after layers".split()
    size = 12 * (24 * 8 + 24 + 24 * 8)
    after = sum(group.parameters_after for group in plan.groups)
    assert text[1].split("  ")[-1] == "blocks.{0..11}.up"
    assert text[1].startswith(f"blocks.{{0..11}}.up       24  9 to 24 (mean 12)       {size:,}  ")
    assert f"  {after:,}  " in text[1]
    assert "left alone: blocks.{0..11}.down (8): " in text[2]
    assert (len(text), len(detailed)) == (5, 27)
    assert text[-2:] == detailed[-2:]
    assert detailed[4].split() == ["blocks.3.up", "24", "24", "408", "408", "blocks.3.up"]
    assert nac.Plan.from_json(plan.to_json()).detailed() == plan.detailed()


def made(groups: list[nac.GroupPlan], alone: list[nac.LeftAlone]) -> list[str]:
    cost = nac.Cost(100, 100)
    return str(nac.Plan(tuple(groups), tuple(alone), cost, cost)).splitlines()


def test_what_is_of_a_kind() -> None:
    """The same name but for the numbers of blocks, the same size and the same layers; and the same reason."""
    numbers = [0, 1, 2, 4, 5, 9]
    alike = [nac.GroupPlan(f"h.{n}.up", (f"h.{n}.up", f"h.{n}.gate"), 8, 4, n > 0) for n in numbers]
    wide = [nac.GroupPlan(f"h.{n}.up", (f"h.{n}.up",), 16, 4) for n in (3, 6)]
    last = [nac.GroupPlan(f"features.{n}", (f"features.{n}",), 8, 4) for n in range(6)]
    experts = [nac.GroupPlan(f"h.{n}.experts.{m}.up", (), 8, 4) for n in range(2) for m in range(4 - n)]
    lines = [line.split("  ")[0] for line in made([*alike, *wide, *last, *experts], [])[1:-2]]
    assert lines == [
        "h.0.up",
        "h.{1..2, 4..5, 9}.up",
        "h.3.up",
        "h.6.up",
        *(f"features.{n}" for n in range(6)),
        "h.{0..1}.experts.{0..3}.up (7 of them)",
    ]
    own = [nac.LeftAlone(f"h.{n}.q", 8, f"written in place in h.{n}.attention") for n in range(10, 16)]
    same = [nac.LeftAlone(f"h.{n}.v", 8, "normalised over channels in h.0.norm") for n in range(6)]
    other = [nac.LeftAlone("h.7.v", 8, "model output"), nac.LeftAlone("head", 1000, "model output")]
    assert made([], [*own, *same, *other])[:4] == [
        "left alone: h.{10..15}.q (8): written in place in h.{10..15}.attention",
        "left alone: h.{0..5}.v (8): normalised over channels in h.0.norm",
        "left alone: h.7.v (8): model output",
        "left alone: head (1,000): model output",
    ]


def test_json_round_trip() -> None:
    plan = nac.plan(*network("residual"), width=0.5)
    assert nac.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"groups": [{"name": 1}], "left_alone": []}'])
def test_json_that_is_no_plan(text: str) -> None:
    with pytest.raises(ValueError, match="not the JSON of a plan"):
        nac.Plan.from_json(text)


@pytest.mark.parametrize(
    ("width", "message"),
    [
        ({"5": 0}, "5: cannot keep 0 of 16 neurons, expected 1 to 16"),
        ({"5": -3}, "5: cannot keep -3 of 16 neurons"),
        ({"5": 17}, "5: cannot keep 17 of 16 neurons"),
        ({"5": 0.0}, r"5: cannot keep the share 0\.0"),
        ({"5": 1.5}, r"5: cannot keep the share 1\.5"),
        ({"5": float("nan")}, "5: cannot keep the share nan"),
        ({"5": True}, "5: width is True, expected a number of neurons"),
        ({"5": "half"}, "5: width is 'half'"),
        ({"nosuch": 3}, "unknown layer 'nosuch' in the widths, expected one of: 0, 2, 5, 7, 10, 14"),
        ({"16": 3}, "16 cannot be compressed: model output; take it out of the widths"),
        (0.0, r"cannot keep the share 0\.0"),
        (2, r"cannot keep the share 2\.0"),
    ],
    ids=str,
)
def test_impossible_widths(width: nac.Width, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nac.plan(*network("cnn"), width=width)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model, inputs = network("cnn")
    with torch.no_grad():
        model[5].weight[0, 0] = value
    with pytest.raises(ValueError, match=r"5\.weight has 9 values that are NaN or infinite"):
        nac.plan(model, inputs, width=0.5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_weights_that_are_not_floating(dtype: torch.dtype) -> None:
    model, inputs = network("cnn")
    model[5].weight = nn.Parameter(torch.zeros(16, 6, 3, 3, dtype=dtype), requires_grad=False)
    with pytest.raises(TypeError, match=rf"5\.weight is {str(dtype)[6:]}, expected a floating type"):
        nac.plan(model, inputs, width=0.5)


def test_nothing_to_compress() -> None:
    with pytest.raises(ValueError, match=r"nothing to compress: 0 \(3\): model output"):
        nac.plan(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4), width=0.5)
    with pytest.raises(ValueError, match="nothing to compress: expected at least two linear layers"):
        nac.plan(nn.Sequential(nn.ReLU()), torch.randn(2, 4), width=0.5)


class WritesItsSize(nn.Module):
    """The width of a layer is written into the forward pass, where no record can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 12), nn.Linear(12, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu().view(-1, 12)
        return self.last(self.second(x).relu())


def test_a_group_whose_trial_fails_is_left_alone_and_the_others_are_not() -> None:
    plan = nac.plan(WritesItsSize(), torch.randn(2, 4), width=0.5)
    assert plan.widths == {"second": 5}
    failed = next(a for a in plan.left_alone if a.layer == "first")
    assert "the smaller network does not run: RuntimeError" in failed.reason


class DividesByItsSize(nn.Module):
    """Runs at any width, but computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(x / x.shape[1])


def test_a_group_whose_function_depends_on_its_size_is_left_alone() -> None:
    with pytest.raises(ValueError, match=r"merging identical neurons changed the outputs \(relative error"):
        nac.plan(DividesByItsSize(), torch.randn(2, 4), width=0.5)


class HidesBehindZeros(nn.Module):
    """The example inputs are zeros, and so is the head: without care the trial would see no difference."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 2)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().view(-1, 3, 4).sum(1).repeat(1, self.first.out_features // 4) / 2)


class AddsItsInput(nn.Module):
    """Channels meet the network's input, which is different for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu() + x)


@pytest.mark.parametrize("build", [HidesBehindZeros, AddsItsInput])
def test_example_inputs_of_zeros_hide_nothing(build: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"nothing to compress: .*first \("):
        nac.plan(build(), torch.zeros(2, 12), width=0.5)


def test_the_trial_is_not_vacuous_behind_a_head_of_zeros() -> None:
    """A wrong rule would be caught by the trial alone."""
    from nac_gpu.network.copying import converted
    from nac_gpu.planning.trial import Trial
    from nac_gpu.tracing.graph import Choice, Group, Member
    from nac_gpu.tracing.trace import record

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(model[2].weight)
    double, inputs = converted(model, torch.zeros(2, 6), torch.float64)
    (group,) = record(double, inputs).groups
    trial = Trial(double, inputs)
    assert not trial.run([Choice(group, 4)]).refused
    wrong = tuple(Member(m.tensor, m.dim, "mean", m.index) for m in group.members)
    broken = Group(group.name, group.size, wrong, group.producers, group.norms)
    (refused,) = Trial(double, inputs).run([Choice(broken, 4)]).refused
    assert "changed the outputs" in refused.reason


def test_only_and_skip_by_name_module_and_pattern() -> None:
    model, inputs = network("vgg19")
    names = [g.name for g in nac.plan(model, inputs, width=0.5).groups]
    assert names[0] == "features.0"
    assert list(nac.plan(model, inputs, width=0.5, only=["features.0", "features.4*"]).widths) == [
        name for name in names if name == "features.0" or name.startswith("features.4")
    ]
    plan = nac.plan(model, inputs, width=0.5, skip=["features.0"])
    assert list(plan.widths) == names[1:]
    assert ("features.0", "it is named in skip=") in {(a.layer, a.reason) for a in plan.left_alone}
    assert nac.plan(model, inputs, width=0.5, only=["features"]).widths.keys() == dict.fromkeys(names).keys()
    small = nac.compress(model, inputs, width=0.5, only=["features.0"], method="random")
    assert nac.cost(small, inputs) == nac.plan(model, inputs, width=0.5, only=["features.0"]).after


@pytest.mark.parametrize("option", ["only", "skip"])
def test_unknown_names_in_filters(option: str) -> None:
    model, inputs = network("cnn")
    with pytest.raises(ValueError, match=rf"unknown layer 'nothing' in {option}=, expected some of: 0, 2, "):
        nac.plan(model, inputs, width=0.5, **{option: ["nothing"]})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=rf"{option}='2': expected a sequence of names, such as \['2'\]"):
        nac.plan(model, inputs, width=0.5, **{option: "2"})  # type: ignore[arg-type]


class Auxiliary(nn.Module):
    """A head that runs in training only, and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.extra = nn.Linear(6, 10), nn.Linear(10, 3), nn.Linear(10, 4)
        self.unused = nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(x).relu()
        return (self.head(x), self.extra(x)) if self.training else self.head(x)


def test_heads_that_run_in_training_only_are_compressed_too() -> None:
    model = Auxiliary().eval()
    plan = nac.plan(model, torch.randn(2, 6), width=0.5)
    assert plan.widths == {"body": 5}
    alone = {a.layer: a.reason for a in plan.left_alone}
    assert alone == {
        "head": "model output",
        "extra": "model output",
        "unused": "it does not run on these example inputs",
    }
    small = nac.compress(model, torch.randn(2, 6), plan)
    assert [tuple(t.shape) for t in small.train()(torch.randn(2, 6))] == [(2, 3), (2, 4)]
    assert not model.training


def test_a_plan_says_what_are_heads() -> None:
    model = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    plan = nac.plan(model, torch.randn(2, 5, 8), width={"self_attn.*": 2})
    assert [(g.name, g.before, g.after, g.units) for g in plan.groups] == [
        ("self_attn.in_proj_weight", 4, 2, True),
        ("linear1", 16, 16, False),
    ]
    assert "heads or groups of self_attn.in_proj_weight" in str(plan)
    assert nac.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("the smaller network does not run: RuntimeError: shape", "take it from a tensor's shape"),
        ("operation _fft_c2c is not known in Net", "no rule: write it with"),
        ("merging identical neurons changed the outputs (relative error 1e-2)", "used by their position"),
        ("channels are picked by index in Net", "used by their position"),
        ("channels are moved by a fixed number of places in Net", "used by their position"),
        ("its weight both makes and reads these channels", "a parameter of its own"),
        ("values are written in place in Net", "write into a new tensor"),
        ("it does not run on these example inputs", "inputs with which these layers run"),
        ("a convolution's kernel is not a parameter in Net", "torch.nn.utils.parametrize"),
        ("multiplied by values that are not a parameter in Net", None),
        ("normalised over channels in norm", None),
        ("model output", None),
    ],
)
def test_refusals_say_what_would_help(reason: str, remedy: str | None) -> None:
    found = nac.LeftAlone("layer", 3, reason).remedy
    if remedy is None:
        assert found is None
    else:
        assert found is not None
        assert remedy in found


def test_remedies_are_printed_once() -> None:
    class Kernels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
            self.d, self.e = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            moved = self.a(x).roll(1, 1), self.b(x).roll(2, 1)
            return self.c(moved[0]) + self.c(moved[1]) + self.e(self.d(x).relu())

    text = str(nac.plan(Kernels(), torch.randn(2, 4), width=0.5))
    assert text.count("channels are moved by a fixed number of places") == 2
    assert text.count("to compress more: channels that are used by their position keep their number") == 1


def test_a_plan_is_carried_out_whole_or_not_at_all() -> None:
    model, inputs = network("split")
    plan = nac.plan(model, inputs, width=0.5)
    with pytest.raises(ValueError, match="only= and skip= are part of a plan"):
        nac.compress(model, inputs, plan, skip=["make"])
    with pytest.raises(ValueError, match=r"make: cannot keep 99 of 6 neurons"):
        nac.compress(model, inputs, nac.Plan.from_json(plan.to_json().replace('"after": 3', '"after": 99', 1)))


def test_a_plan_that_does_not_run_any_more_is_an_error() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).view(-1, 2, 4).flatten(1))

    model, inputs = Sized(), torch.randn(2, 4)
    first = nac.GroupPlan("first", ("first",), 4, 3)
    cost = nac.cost(model, inputs)
    with pytest.raises(ValueError, match=r"the plan cannot be carried out: first \(4\): the smaller network does not"):
        nac.compress(model, inputs, nac.Plan((first,), (), cost, cost))

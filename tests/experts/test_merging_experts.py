"""Similar experts become one, and what that must not change stays."""

import copy
from pathlib import Path

import pytest
import torch
from tinymixtures import CLASSES, HIDDEN, Deep, X, made, with_copies
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.experts.merging import _one
from nac_gpu.experts.mixtures import find_mixtures
from nac_gpu.merging import refinement
from nac_gpu.network.comparing import relative_error


@pytest.mark.parametrize("kind", CLASSES)
def test_experts_that_differ_in_the_order_of_their_neurons_become_one_unchanged(kind: str) -> None:
    model = with_copies(kind).double()
    inputs = X.double()
    small = nac.merge_experts(model, inputs, 3, refine=0)
    with torch.no_grad():
        assert relative_error([small(inputs)], [model(inputs)]) < 1e-10
    assert small.num_experts == small.router.out_features == len(small.router.weight) == 3
    assert nac.cost(small, inputs).parameters < 0.65 * nac.cost(model, inputs).parameters
    assert model.num_experts == 6


@pytest.mark.parametrize("kind", CLASSES)
def test_similar_experts_are_found_and_merged_by_their_neurons(kind: str) -> None:
    """Means of their weights, as they lie, would be experts of another function."""
    model = with_copies(kind, noise=0.03)
    small = nac.merge_experts(model, X, 3, refine=0)
    with torch.no_grad():
        expected = model(X)
        error = float((small(X) - expected).square().mean() / expected.var())
    assert error < 0.005
    bare = copy.deepcopy(small)
    (mixture,), _ = find_mixtures(model, X)
    state = dict(model.named_parameters())
    own = [mixture.expert(state, number) for number in range(6)]
    means = [_one([own[a], own[b]], ()) for a, b in ((0, 5), (1, 3), (2, 4))]
    named = dict(bare.named_parameters())
    with torch.no_grad():
        for name, tensor in mixture.written(means).items():
            named[name].copy_(tensor)
        worse = float((bare(X) - expected).square().mean() / expected.var())
    assert worse > 20 * error


@pytest.mark.parametrize("kind", CLASSES)
def test_an_expert_that_stays_alone_is_untouched(kind: str) -> None:
    model = made(kind)
    small = nac.merge_experts(model, X, 5, refine=0)
    (mixture,), _ = find_mixtures(model, X)
    before, after = dict(model.named_parameters()), dict(small.named_parameters())
    old = [mixture.expert(before, number) for number in range(6)]
    new = [mixture.expert(after, number) for number in range(5)]
    same = [[all(torch.equal(a[part], b[part]) for part in a) for b in new] for a in old]
    assert sum(map(any, same)) == 4


def test_experts_of_several_hidden_layers_become_the_mean_of_their_weights() -> None:
    torch.manual_seed(0)
    model = Deep(count=2).eval()
    small = nac.merge_experts(model, X, 1, refine=0)
    for at in (0, 2, 4):
        both = [expert[at].weight for expert in model.experts]
        assert torch.allclose(small.experts[0][at].weight, (both[0] + both[1]) / 2)


def test_experts_that_the_inputs_do_not_reach_are_merged_too() -> None:
    model = with_copies("listed")
    unreached = torch.tensor([-1e3, 0.0, -1e3, 0.0, -1e3, -1e3])
    with torch.no_grad():
        model.router.bias += unreached
    small = nac.merge_experts(model, X, 3, refine=0)
    with torch.no_grad():
        model.router.bias -= unreached
        small.router.bias -= torch.stack([unreached[0], unreached[1], unreached[2]])
        assert relative_error([small(X)], [model(X)]) < 1e-3


@pytest.mark.parametrize("kind", CLASSES)
def test_refinement_makes_up_for_what_it_can(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "STEPS", 400)
    model = made(kind, picks=2)
    data = torch.randn(256, 16, 6, generator=torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    bare, refined = (nac.merge_experts(model, X, 4, calibration=data.split(32), refine=r) for r in (0, 100))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        expected = model(X)
        errors = [float((small(X) - expected).square().mean()) for small in (bare, refined)]
    assert errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize("kind", CLASSES)
def test_the_original_stays_and_the_copy_is_like_it(kind: str) -> None:
    model = made(kind).to(torch.bfloat16).train()
    model.head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    small = nac.merge_experts(model, X.bfloat16(), 0.5, refine=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert small.training
    assert not small.head.weight.requires_grad
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert copy.deepcopy(small)(X.bfloat16()).shape == (64, 4)


@pytest.mark.parametrize("kind", CLASSES)
def test_fewer_experts_go_to_files_and_come_back(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    small = nac.compress(nac.merge_experts(model, X, 3), X, width=0.5, calibration="none")
    again = nac.merge_experts(small, X, 2)
    for number, kept in enumerate((small, again)):
        nac.save(kept, tmp_path / f"{number}.safetensors")
        loaded = nac.load(tmp_path / f"{number}.safetensors", lambda: made(kind))
        with torch.no_grad():
            assert torch.equal(loaded(X), kept(X))
        assert repr(loaded) == repr(kept)


@pytest.mark.parametrize("kind", CLASSES)
def test_what_remains_can_be_trained(kind: str) -> None:
    small = nac.merge_experts(made(kind), X, 2)
    small.train()(X).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in small.parameters())


class Gated(nn.Module):
    """Pairs of equal experts, in a dictionary, under a router of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.router = nn.Linear(6, 6, bias=kind == "softmax")
        own = [self.expert() for _ in range(3)]
        self.experts = nn.ModuleDict({f"expert_{i}": copy.deepcopy(own[i % 3]) for i in range(6)})
        with torch.no_grad():
            self.router.weight[3:] = self.router.weight[:3]
            self.router.weight.mul_(4)
            if kind == "softmax":
                self.router.bias[3:] = self.router.bias[:3]
        for seen, expert in enumerate(self.experts.values()):
            expert[1].num_batches_tracked += 40 * seen

    def expert(self) -> nn.Module:
        norm = nn.BatchNorm1d(HIDDEN)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias)
        return nn.Sequential(nn.Linear(6, HIDDEN), norm, nn.ReLU(), nn.Linear(HIDDEN, 4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        if self.kind in ("softmax", "first"):
            scores = scores.softmax(-1)
        elif self.kind == "sigmoid":
            scores = scores.sigmoid()
        answers = torch.stack([e(x) * s[:, None] for e, s in zip(self.experts.values(), scores.mT, strict=True)])
        return answers[scores.argmax(-1), torch.arange(len(x))] if self.kind == "first" else answers.sum(0)


@pytest.mark.parametrize("kind", ["softmax", "first", "sigmoid", "linear"])
def test_what_merged_experts_answer_as_depends_on_the_router(kind: str) -> None:
    """Scores that add up to one over all, of which all or the first count, and scores that do not add up."""
    model, x = Gated(kind).eval(), torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    small = nac.merge_experts(model, torch.zeros_like(x), 3, refine=0)
    assert list(small.experts) == ["expert_0", "expert_1", "expert_2"]
    with torch.no_grad():
        assert relative_error([small(x)], [model(x)]) < 1e-5
    assert small.experts["expert_1"][1].num_batches_tracked.dtype == torch.int64


def test_bad_requests_are_errors() -> None:
    model = made("listed", picks=2)
    with pytest.raises(ValueError, match=r"with fewer experts \(experts: 1 of 6\).*out of range; a router that picks"):
        nac.merge_experts(model, X, 1)
    with pytest.raises(ValueError, match="experts: cannot keep 7 of 6 experts, expected 1 to 6"):
        nac.merge_experts(model, X, 7)
    with pytest.raises(ValueError, match="unknown experts 'layer'; expected some of: experts"):
        nac.merge_experts(model, X, {"layer": 2})
    with pytest.raises(ValueError, match="refine=-1"):
        nac.merge_experts(model, X, 2, refine=-1)
    with torch.no_grad():
        model.router.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"router\.weight has 1 values"):
        nac.merge_experts(model, X, 2)


def mixtral(layers: int = 2) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config).eval()


def gpt_oss() -> nn.Module:
    """Gates and values alternate; routers and experts have biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 4, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = GptOssForCausalLM(GptOssConfig(num_local_experts=4, num_experts_per_tok=1, **sizes, **heads)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "mlp" in name:
                tensor.normal_(0, 0.3)
    return model


def test_gates_and_values_that_alternate_are_one_neuron() -> None:
    model = gpt_oss()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    both = torch.stack([2 * order, 2 * order + 1], 1).flatten()
    with torch.no_grad():
        for layer in model.model.layers:
            experts, router = layer.mlp.experts, layer.mlp.router
            for copied, number in ((2, 0), (3, 1)):
                router.weight[copied], router.bias[copied] = router.weight[number], router.bias[number]
                experts.gate_up_proj[copied] = experts.gate_up_proj[number][:, both]
                experts.gate_up_proj_bias[copied] = experts.gate_up_proj_bias[number][both]
                experts.down_proj[copied] = experts.down_proj[number][order]
                experts.down_proj_bias[copied] = experts.down_proj_bias[number]
    small = nac.merge_experts(model, TOKENS, 2, refine=0)
    with torch.no_grad():
        assert relative_error([small(**TOKENS).logits], [model(**TOKENS).logits]) < 1e-5
    plan = nac.plan(model, TOKENS, width=0.5, calibration="none")
    assert plan.widths["model.layers.0.mlp.experts.gate_up_proj"] == 8


TOKENS = {"input_ids": torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))}


def test_a_model_of_transformers_keeps_its_classes_and_goes_to_a_folder(tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    model = mixtral()
    small = nac.merge_experts(model, TOKENS, 0.5)
    assert small.config.num_local_experts == small.num_experts == 2
    assert model.config.num_local_experts == 4
    assert small.model.layers[1].mlp.experts.down_proj.shape == (2, 16, 24)
    nac.save(small, tmp_path / "small")
    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**TOKENS).logits, small(**TOKENS).logits)
    assert small.generate(**TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 15)
    assert small(**TOKENS, output_router_logits=True, labels=TOKENS["input_ids"]).loss.isfinite()


def test_layers_may_keep_other_numbers_of_experts(tmp_path: Path) -> None:
    model = mixtral()
    small = nac.merge_experts(model, TOKENS, {"*.1.mlp.experts": 3}, refine=0)
    assert small.config.num_local_experts == 4
    first, second = (layer.mlp for layer in small.model.layers)
    assert (first.gate.num_experts, first.experts.num_experts) == (4, 4)
    assert (second.gate.num_experts, second.experts.num_experts) == (3, 3)
    assert torch.equal(first.experts.down_proj, model.model.layers[0].mlp.experts.down_proj)
    with pytest.raises(ValueError, match="cannot express"):
        nac.save(small, tmp_path / "small")
    nac.save(small, tmp_path / "small.safetensors")
    loaded = nac.load(tmp_path / "small.safetensors", mixtral)
    with torch.no_grad():
        assert torch.equal(loaded(**TOKENS).logits, small(**TOKENS).logits)

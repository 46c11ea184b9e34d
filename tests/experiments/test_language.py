"""Language models and sentence encoders beside methods of others: tiny ones, with random weights."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn

import language
from common import language_blocks as blocks
from common import language_data as data
from common import language_peers as peers
from common import language_slicing as slicing
from common.language_statistics import Walk, covariance, observe

WORDS = [f"w{number}" for number in range(60)]
KEPT = 0.7


def tokenizer() -> Any:
    """Words are tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", *WORDS]
    made = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def scattered(model: nn.Module) -> nn.Module:
    """With weights that make every part of a model matter."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn_like(value)
            value.copy_(1 + 0.2 * noise if "norm" in name.lower() and value.ndim == 1 else 0.2 * noise)
    return model.eval()


def llama(tied: bool = True, bias: bool = False) -> Any:
    """Three layers of three groups of two heads each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=62,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        bos_token_id=None,
        eos_token_id=None,
    )
    return scattered(LlamaForCausalLM(config))


def bert() -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=62,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=32,
    )
    return scattered(BertModel(config))


def llama_batches() -> list[data.Batch]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(2, 62, (4, 16))} for _ in range(3)]


def bert_batches() -> list[data.Batch]:
    sentences = [" ".join(WORDS[start : start + 5 + start % 7]) for start in range(40)]
    return data.sentence_batches(tokenizer(), sentences, length=32, rows=8)


CASES = {"llama": (llama, llama_batches), "bert": (bert, bert_batches)}
MAKERS = pytest.mark.parametrize(("make", "inputs"), CASES.values(), ids=CASES)


def outputs(model: Any, batches: list[data.Batch]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([(found := model(**batch)).get("logits", found[0]).flatten(0, 1) for batch in batches])


def subject(model: Any, batches: list[data.Batch]) -> language.Subject:
    return language.Subject(model, batches, lambda small: {}, closeness=blocks.parameters)


@MAKERS
@pytest.mark.parametrize("removed", [0.0, 0.3])
@pytest.mark.parametrize("method", [*language.PRUNING, language.DROPPED, language.LAST, language.BEST])
def test_peers_meet_the_budget_and_removing_nothing_changes_nothing(
    make: Callable[[], Any], inputs: Callable[[], list[data.Batch]], method: str, removed: float
) -> None:
    model, batches = make(), inputs()
    before = outputs(model, batches)
    whole = blocks.parameters(model)
    small = subject(model, batches).compressed(method, removed)
    assert torch.equal(outputs(model, batches), before), "the original is not changed"
    after, found = blocks.parameters(small), outputs(small, batches)
    if removed == 0:
        assert after == whole
        assert (found - before).abs().max() < 1e-4
        return
    unit = max(blocks.unit_parameters(model, group) for group in blocks.groups_of(model))
    layer = blocks.parameters(blocks.layers_of(model)[0])
    steps = {language.DROPPED: layer, language.LAST: layer, language.BEST: layer}
    neurons = sum(blocks.unit_parameters(model, group) for group in blocks.groups_of(model) if group.kind == "neurons")
    slack = steps.get(method, unit if "FLAP" in method else neurons)
    over = layer / 2 if method in (language.LAST, language.BEST) else 0
    assert (1 - removed) * whole - slack <= after <= (1 - removed) * whole + over
    assert torch.isfinite(found).all()
    assert (found - before).abs().max() > 1e-3
    heads = [group.units for group in blocks.groups_of(small) if group.kind == "heads"]
    if "MLPs only" in method:
        assert heads == [group.units for group in blocks.groups_of(model) if group.kind == "heads"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rotations_change_nothing_and_slices_meet_the_budget(tied: bool, bias: bool) -> None:
    model, batches = llama(tied=True, bias=bias), llama_batches()
    before = outputs(model, batches)
    rotated: Any = slicing.sliced_to(model, 48, batches, tied)
    assert (outputs(rotated, batches) - before).abs().max() < 1e-4
    basis = rotated.model.layers[1].attention_shortcut.weight
    assert (basis @ basis.T - torch.eye(48)).abs().max() < 1e-5
    assert (basis - torch.eye(48)).abs().max() > 0.1
    for width in (48, 31):
        sliced = slicing.sliced_to(model, width, batches, tied)
        assert blocks.parameters(sliced) == slicing.sliced_parameters(model, width, tied)
    whole = blocks.parameters(model)
    small = subject(model, batches).compressed("SliceGPT, tied" if tied else "SliceGPT", 0.3)
    width = small.get_parameter("model.layers.0.mlp_shortcut.weight").shape[0]
    assert blocks.parameters(small) <= 0.7 * whole < slicing.sliced_parameters(model, width + 1, tied)
    assert torch.equal(outputs(model, batches), before)


def test_a_slice_is_a_projection_of_the_residual_stream() -> None:
    """What the sliced model computes: the original, with all hidden states projected in front of its norms."""
    model, batches = llama(), llama_batches()
    bases = slicing.components(model, batches, 30)
    small = slicing.sliced_to(model, 30, batches)
    places = iter(bases)

    def project(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        basis = next(places)
        return (inputs[0] @ basis @ basis.T,)

    layers = model.model.layers
    with torch.no_grad():
        hidden = model.model.embed_tokens(batches[0]["input_ids"])
        walk = Walk(model, batches[:1])
        for layer in layers:
            (hidden,) = project(layer, (hidden,))
            hidden = hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **walk.kwargs[0])[0]
            (hidden,) = project(layer, (hidden,))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        (hidden,) = project(layers, (hidden,))
        expected = model.lm_head(model.model.norm(hidden))
        # norms of fewer components are the same but for their epsilon
        assert (small(**batches[0]).logits - expected).abs().max() < 1e-3


def test_flap_removes_what_hardly_varies_and_its_bias_says_what_it_was() -> None:
    model, batches = llama(), llama_batches()
    with torch.no_grad():
        gate, up = model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj
        model.model.layers[1].mlp.down_proj.weight[:, 7] *= 1e-4
        up.weight[3] = up.weight[4] = gate.weight[3] = gate.weight[4] = 0
    groups = blocks.groups_of(model)
    observed = observe(model, batches, [group.reader for group in groups])
    scored = peers.scores(model, groups, observed, "fluctuation", seed=0)
    neurons = next(group for group in groups if group.layer == 1 and group.kind == "neurons")
    assert set(scored[neurons].argsort()[:3].tolist()) == {3, 4, 7}
    read = torch.cat(
        list(Walk(model, batches).read(blocks.layers_of(model)[0], blocks.linear(model, groups[1].reader)))
    )
    moments = observed.moments[groups[1].reader]
    assert torch.allclose(moments.mean.float(), read.mean(0), atol=1e-5)
    assert torch.allclose(moments.variance.float(), read.var(0, correction=0), atol=1e-5)
    weight = model.model.layers[0].mlp.down_proj.weight
    small = peers.with_layers(model, range(3))
    kept = torch.arange(1, 40)
    peers.cut(small, groups[1], kept, moments)
    found = blocks.linear(small, groups[1].reader)
    expected = read[:, 1:] @ weight[:, 1:].T + read[:, 0].mean() * weight[:, 0]
    assert torch.allclose(found(read[:, 1:]), expected, atol=1e-4)


def test_a_ridge_recovers_neurons_that_others_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neuron that is another one's multiple is not missed; and all regressions are on what comes in by now."""
    monkeypatch.setattr(peers, "RIDGE", 1e-8)
    model, batches = llama(), llama_batches()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[0] = layer.mlp.gate_proj.weight[1]
            layer.mlp.up_proj.weight[0] = 3 * layer.mlp.up_proj.weight[1]
    small = peers.with_layers(model, range(3))
    walk = Walk(small, batches)
    for group in blocks.groups_of(small):
        if group.kind == "neurons":
            peers.cut_by_ridge(small, group, torch.arange(1, 40), walk)
            walk.step(blocks.layers_of(small)[group.layer])
    assert (outputs(small, batches) - outputs(model, batches)).abs().max() < 1e-3
    with torch.no_grad():
        through = small.get_submodule("model.norm")(walk.hidden[0])
        assert torch.allclose(through, small.get_submodule("model")(**batches[0]).last_hidden_state, atol=1e-4)


def test_padding_is_not_looked_at() -> None:
    model, batches = bert(), bert_batches()
    assert any(not bool(batch["attention_mask"].all()) for batch in batches)
    groups = blocks.groups_of(model)
    alone = [
        {name: value[:, : int(batch["attention_mask"][row].sum())][row : row + 1] for name, value in batch.items()}
        for batch in batches
        for row in range(len(batch["input_ids"]))
    ]
    padded, single = (observe(model, given, [group.reader for group in groups]) for given in (batches, alone))
    for group in groups:
        one, other = padded.moments[group.reader], single.moments[group.reader]
        assert one.count == other.count == sum(map(data.count_tokens, batches))
        assert torch.allclose(one.squares, other.squares, rtol=1e-4)
    assert padded.change == pytest.approx(single.change, rel=1e-4)
    layer = blocks.layers_of(model)[0]
    mean, products = covariance(Walk(model, batches).read(layer, layer.output.dense))
    moments = padded.moments["encoder.layer.0.output.dense"]
    assert torch.allclose(mean, moments.mean, atol=1e-5)
    assert torch.allclose(products.diagonal(), moments.variance, atol=1e-5)


def test_the_layers_that_change_least_are_dropped() -> None:
    model, batches = llama(), llama_batches()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight *= 1e-3
        model.model.layers[1].mlp.down_proj.weight *= 1e-3
    small = subject(model, batches).compressed(language.DROPPED, 0.2)
    assert len(blocks.layers_of(small)) == 2
    assert torch.equal(small.model.layers[1].mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight)
    assert (outputs(small, batches) - outputs(model, batches)).abs().max() < 0.1


def test_perplexity_is_that_of_the_loss_of_transformers() -> None:
    model = llama()
    texts = torch.cat([batch["input_ids"] for batch in llama_batches()])
    with torch.no_grad():
        loss = float(model(input_ids=texts, labels=texts).loss)
    assert data.perplexity(model, texts) == pytest.approx(math.exp(loss), rel=1e-5)
    assert data.windows(torch.arange(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert data.spread(torch.arange(10), 3).tolist() == [0, 3, 6]
    with pytest.raises(ValueError, match="a text has 3 tokens, expected at least one window of 4"):
        data.windows(torch.arange(3), 4)


def test_agreement_of_embeddings() -> None:
    torch.manual_seed(0)
    one, other = (nn.functional.normalize(torch.randn(20, 5), dim=1) for _ in range(2))
    assert data.agreement(one, one) == pytest.approx({"cosine": 1, "rank correlation": 1, "same neighbour": 1})
    pairs = tuple(torch.triu_indices(20, 20, offset=1))
    expected = stats.spearmanr((one @ one.T)[pairs].double(), (other @ other.T)[pairs].double()).statistic
    assert data.agreement(one, other)["rank correlation"] == pytest.approx(expected, abs=1e-3)
    assert data._ranks(torch.tensor([2.0, 1.0, 2.0, 5.0])).tolist() == [2.5, 1, 2.5, 4]


def write_text(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    lines = ["= w1 ="]
    lines += [" ".join(WORDS[number] for number in torch.randint(60, (9,))) + " ." for _ in range(40)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.usefixtures("short_dreams")
@pytest.mark.filterwarnings("ignore")  # of other libraries
@pytest.mark.parametrize("task", ["perplexity", "embeddings"])
def test_every_method_is_measured_once(task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokens = (llama() if task == "perplexity" else bert()), tokenizer()
    model.save_pretrained(tmp_path / "tiny")
    tokens.save_pretrained(tmp_path / "tiny")
    options = language.Options(
        model=tmp_path / "tiny",
        calibration=write_text(tmp_path / "valid.txt", 0),
        test=(write_text(tmp_path / "test.txt", 1), write_text(tmp_path / "other.txt", 2)),
        task=task,
        tokens=160,
        length=16,
        windows=(4,),
        sentences=20,
        removed=(0.3,),
        output=tmp_path / "out.json",
    )
    language.main(options)
    stored = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    rows = stored["seeds"]["0"]["rows"]
    names = [language.row(method, 0.3) for method in language.DEFAULT[task]]
    assert list(rows) == ["original", *names]
    assert str(tmp_path) not in json.dumps(stored)
    measure = "test" if task == "perplexity" else "cosine, test"
    assert all(math.isfinite(rows[name][measure]) for name in rows)
    assert all(rows[name]["seconds"] >= 0 and rows[name]["memory"] > 0 for name in names)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == len(rows) + 2
    written = (tmp_path / "out.json").stat().st_mtime_ns
    language.main(options)  # all is there
    assert (tmp_path / "out.json").stat().st_mtime_ns == written


def test_what_does_not_exist_or_does_not_fit_is_refused() -> None:
    options = language.Options(model=Path(), calibration=Path(), test=(), methods=("SliceGTP",))
    with pytest.raises(SystemExit, match="'SliceGTP', expected some of: nac; nac no data; SliceGPT"):
        language.chosen_methods(options)
    model, batches = llama(), llama_batches()
    for method in ("FLAP", "Wanda", "SliceGPT"):
        with pytest.raises(ValueError, match="expected at most"):
            subject(model, batches).compressed(method, 0.999)
    with pytest.raises(TypeError, match="Linear has neither the layers of a Llama nor those of a BERT"):
        blocks.layout_of(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="BertModel is no Llama-like causal language model"):
        slicing.sliced_to(bert(), 8, batches)

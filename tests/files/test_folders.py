"""Folders of transformers: what their configuration cannot express is said, before the work and when saving."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import nac_gpu as nac
from nac_gpu.files.folders import check_folder

TOKENS = {"input_ids": torch.ones(2, 9, dtype=torch.int64)}
PIXELS = {"pixel_values": torch.zeros(1, 3, 16, 16)}
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert(**options: Any) -> Any:
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **{**SIZES, **options})).eval()


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **SIZES)).eval()


def vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)).eval()


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, **sizes)).eval()


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=50, **sizes)).eval()


HEADS = (
    r"the configuration of BertModel cannot express that heads were merged "
    r"\(encoder\.layer\.0\.attention\.self\.query: 4 -> {0}, and 1 more\); leave heads as they are with "
    r"only=\[\"\*intermediate\*\"\] \(nac: --only '\*intermediate\*'\), or save to a file such as "
    r"small\.safetensors, which nac_gpu\.load opens"
)
WIDTHS = "of {0} has one width for all layers and cannot express different ones \\({1}\\); give all layers of a kind"


@pytest.mark.parametrize(
    ("build", "inputs", "wanted", "message"),
    [
        (bert, TOKENS, {"width": 0.5}, HEADS.format(2)),
        (bert, TOKENS, {"width": 0.75}, HEADS.format(3)),  # with which the configuration builds nothing at all
        (bert, TOKENS, {"width": {"encoder.layer.0": 0.5}}, "heads were merged .*and has one width for all layers"),
        (
            llama,
            TOKENS,
            {"width": {"*.0.mlp": 0.5}},
            WIDTHS.format("LlamaForCausalLM", r"24 in model\.layers\.0\.mlp\.gate_proj, 48 in model\.layers\.1\..*"),
        ),
        (
            llama,
            TOKENS,
            {"width": 0.5, "only": ["*.1.mlp"]},
            WIDTHS.format("LlamaForCausalLM", r"48 in model\.layers\.0\..*, 24 in model\.layers\.1\..*"),
        ),
        (
            vit,
            PIXELS,
            {"width": {"*.attention": 0.5, "layers.1.attention": 0.5, "*.0.mlp": 12}},
            WIDTHS.format("ViTModel", r"12 in layers\.0\.mlp\.fc1, 48 in layers\.1\.mlp\.fc1"),
        ),
        (
            vit,
            PIXELS,
            {"width": {"layers.1.attention": 0.5}},
            WIDTHS.format("ViTModel", "2 in layers.1.attention.q_proj, 4 in layers.0.attention.q_proj"),
        ),
        (gpt2, TOKENS, {"width": 0.5}, r"cannot express the width of transformer\.h\.0\.mlp\.c_fc: 128 -> 64, and 1"),
        (
            gpt2,
            TOKENS,
            {"width": {"*.0.mlp*": 0.5}},
            r"cannot express the width of transformer\.h\.0\.mlp\.c_fc: 128 -> 64, and 1 more; save to a file such as",
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_a_configuration_cannot_express(
    build: Any, inputs: Any, wanted: Any, message: str, tmp_path: Path
) -> None:
    """The same is said of the plan, and of the result."""
    model = build()
    plan = nac.plan(model, inputs, calibration="none", **wanted)
    with pytest.raises(ValueError, match=message) as before:
        check_folder(model, nac.Plan.from_json(plan.to_json()), "small")
    small = nac.compress(model, inputs, plan, calibration="none")
    with pytest.raises(ValueError, match=message) as after:
        nac.save(small, tmp_path / "small")
    assert str(before.value) == str(after.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("build", "inputs", "wanted"),
    [
        (bert, TOKENS, {"width": 0.5, "only": ["*intermediate*"]}),
        (bert, TOKENS, {"width": {"*intermediate*": 5}}),
        (llama, TOKENS, {"width": 0.5}),
        (vit, PIXELS, {"width": 0.5}),
        (vit, PIXELS, {"width": {"*mlp*": 5}}),
        (vit, PIXELS, {"width": 0.75, "skip": ["*mlp*"]}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_it_can_express_is_saved(build: Any, inputs: Any, wanted: Any, tmp_path: Path) -> None:
    model = build()
    plan = nac.plan(model, inputs, calibration="none", **wanted)
    check_folder(model, plan, "small")
    small = nac.compress(model, inputs, plan, calibration="none")
    nac.save(small, tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small").eval()
    assert torch.equal(again(**inputs)[0], small(**inputs)[0])


def test_the_settings_of_generation_come_along(tmp_path: Path) -> None:
    model = llama()
    model.generation_config.update(do_sample=True, temperature=0.25)
    small = nac.compress(model, TOKENS, width=0.5, calibration="none")
    nac.save(small, tmp_path / "small")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "small").temperature == 0.25


def test_a_model_that_is_compressed_twice_says_what_does_not_fit(tmp_path: Path) -> None:
    """The last plan knows nothing of heads, so the tensors are named."""
    model = bert()
    heads = nac.compress(model, TOKENS, width=0.5, only=["*attention*"], calibration="none")
    small = nac.compress(heads, TOKENS, width=0.5, only=["*intermediate*"], calibration="none")
    with pytest.raises(ValueError, match=r"cannot express .* tensors, such as encoder\.layer\.0\.attention"):
        nac.save(small, tmp_path / "small")


def test_names_of_layers_without_a_common_word() -> None:
    class Named(nn.Module):
        """Hidden layers whose names have nothing in common, and attention."""

    names = ("first.0.alpha", "second.3.beta", "second.4.beta")
    groups = [nac.GroupPlan(name, (name,), 8, 4) for name in names]
    groups.append(nac.GroupPlan("first.0.q", ("first.0.q",), 4, 2, units=True))
    plan = nac.Plan(tuple(groups), (), nac.Cost(0, 0), nac.Cost(0, 0))
    from nac_gpu.files.folders import _channels_only

    assert _channels_only(plan, {}) == ["first.*.alpha", "second.*.beta"]


def test_other_models_have_no_folder(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = nac.plan(model, torch.zeros(1, 4), width=0.5)
    with pytest.raises(ValueError, match=r"small does not end in \.safetensors, and Sequential has no save_pretrained"):
        check_folder(model, plan, "small")

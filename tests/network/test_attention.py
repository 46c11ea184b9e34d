"""nn.MultiheadAttention with fewer heads: the same as PyTorch's where both can compute."""

import pytest
import torch
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.network.attention import MultiheadAttention, shrink
from nac_gpu.network.comparing import relative_error


def pair(**options: object) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, **options).double()  # type: ignore[arg-type]
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = nn.MultiheadAttention(12, 3, **options).double()  # type: ignore[arg-type]
    ours.load_state_dict(theirs.state_dict())
    shrink(ours)
    return theirs, ours


PADDING = torch.tensor([[False, False, True, False, True], [False] * 5])


@pytest.mark.parametrize("weights", ["averaged", "of each head", "none"])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"key_padding_mask": PADDING},
        {"attn_mask": torch.ones(4, 5, dtype=torch.bool).triu(2)},
        {"attn_mask": torch.randn(6, 4, 5).triu(9).bool(), "key_padding_mask": PADDING},
        {"attn_mask": torch.randn(6, 4, 5, dtype=torch.float64)},
    ],
    ids=["free", "padding", "causal", "both", "of each head"],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True, "bias": False},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 7, "vdim": 9, "batch_first": True},
    ],
    ids=["plain", "batch_first", "added", "other_dims"],
)
def test_it_computes_what_pytorch_computes(options: dict[str, object], masks: dict[str, Tensor], weights: str) -> None:
    theirs, ours = pair(**options)
    shapes = [(2, 4, 12), (2, 5, theirs.kdim), (2, 5, theirs.vdim)]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if not theirs.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    more = {**masks, "need_weights": weights != "none", "average_attn_weights": weights == "averaged"}
    with torch.no_grad():
        expected, found = theirs(*inputs, **more), ours(*inputs, **more)
    assert relative_error([found[0]], [expected[0]]) < 1e-12
    if weights != "none":
        assert relative_error([found[1]], [expected[1]]) < 1e-12
    else:
        assert found[1] is None


def test_a_single_sequence() -> None:
    theirs, ours = pair()
    inputs = [torch.randn(4, 12, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        results = zip(ours(*inputs), theirs(*inputs), strict=True)
    for a, b in results:
        assert relative_error([a], [b]) < 1e-12


def test_heads_of_a_transformer_merge_and_the_fused_path_is_not_taken() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True)
    model = nn.Sequential(nn.Linear(5, 12), nn.TransformerEncoder(layer, 2), nn.Linear(12, 3)).eval()
    inputs = torch.randn(2, 6, 5)
    small = nac.compress(model, inputs, width=0.5)
    attention = small[1].layers[0].self_attn  # type: ignore[index, union-attr]
    assert isinstance(attention, MultiheadAttention)
    assert attention.num_heads == 2
    assert attention.in_proj_weight.shape == (18, 12)
    assert attention.out_proj.in_features == 6
    assert type(model[1].layers[0].self_attn) is nn.MultiheadAttention  # type: ignore[index, union-attr]
    with torch.no_grad():
        expected = small.train(False)(inputs)
    with torch.inference_mode():
        assert relative_error([small(inputs)], [expected]) < 1e-5

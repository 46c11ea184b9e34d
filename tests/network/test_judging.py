"""What counts of what networks answer, and how far two of them are apart."""

import copy

import pytest
import torch
from torch import Tensor, nn

from nac_gpu.network.judging import all_answers, answers_in, apart, judged

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
TOKENS = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "attention_mask": MASK}


def states(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed))


def test_the_mean_of_an_encoders_positions_counts_without_padding() -> None:
    values = states()
    found = answers_in({"last_hidden_state": values, "pooler_output": values[:, 0]}, TOKENS)
    positions, first, pooled = found.values
    assert torch.equal(positions, torch.cat([values[0], values[1, :2]]))
    assert torch.equal(first, values[:, 0])
    torch.testing.assert_close(pooled, torch.stack([values[0].mean(0), values[1, :2].mean(0)]))
    (_, whole) = answers_in({"last_hidden_state": values}, {"input_ids": TOKENS["input_ids"]}).values
    torch.testing.assert_close(whole, values.mean(1))


@pytest.mark.parametrize("extra", ["past_key_values", "hidden_states", "loss", "last_states_cache"])
def test_caches_and_what_is_returned_only_if_asked_for_do_not_count(extra: str) -> None:
    found = answers_in({"scores": states()[:, 0], extra: (states(1),)}, TOKENS)
    assert len(found.values) == 1


def test_the_answer_of_a_language_model_is_its_distribution() -> None:
    logits = states()
    found = answers_in({"logits": logits, "past_key_values": (states(1),)}, TOKENS)
    assert found.words
    assert found.values[0].shape == (6, 3)  # two positions are padding
    shifted = answers_in({"logits": logits + 5}, TOKENS)
    assert float(apart(shifted, found)) == pytest.approx(0, abs=1e-5)


def test_a_network_is_judged_by_its_relative_error() -> None:
    torch.manual_seed(0)
    network = nn.Linear(4, 2).eval()
    batches = [torch.randn(64, 4), torch.randn(32, 4)]
    expected = all_answers(network, batches)
    assert judged(network, batches, expected) == 0
    constant = copy.deepcopy(network)
    with torch.no_grad():
        constant.weight.zero_()
        constant.bias.copy_(network(torch.cat(batches)).mean(0))
    error = judged(constant, batches, expected)
    assert error == pytest.approx(1, abs=0.1)  # what answers with the mean loses all of the variance

"""Tokens made up: what the model itself says, or random ones; and what they are good for."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.calibration.gathering import gather
from nac_gpu.calibration.tokens import POSITIONS, Speaker
from nac_gpu.tracing.trace import record


class Counting(nn.Module):
    """Reads tokens and is sure that the next one is one more, modulo `kinds`."""

    def __init__(self, kinds: int = 7, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole
        self.embedding = nn.Embedding(kinds, 16)
        self.hidden = nn.Linear(16, 32)
        self.out = nn.Linear(32, kinds)
        with torch.no_grad():  # solved for the next token's score
            read = self.hidden(self.embedding.weight).relu()
            wanted = 30 * torch.eye(kinds).roll(-1, 0).roll(2, 1)
            self.out.weight.copy_(torch.linalg.pinv(read).mm(wanted).T)
            self.out.bias.zero_()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        read = self.hidden(self.embedding(tokens)).relu()
        if mask is not None:
            read = read * mask[..., None]
        return self.out(read + 0.2 * read.mean(1, keepdim=True) if self.whole else read)


def test_a_model_that_says_which_token_comes_next_is_asked() -> None:
    torch.manual_seed(0)
    model = Counting()
    speaker = Speaker(model, torch.zeros(1, 12, dtype=torch.int64))
    assert speaker.speaks()
    step = int(model(torch.zeros(1, 1, dtype=torch.int64))[0, 0].argmax())
    state = torch.random.get_rng_state()
    batches = [batch for batch in speaker.batches() if isinstance(batch, Tensor)]
    assert torch.equal(torch.random.get_rng_state(), state)
    tokens = torch.cat(batches)
    assert tokens.shape == (256, 12)
    assert torch.equal((tokens[:, 1:] - tokens[:, :-1]) % 7, torch.full((256, 11), step))
    assert tokens[:, 0].unique().numel() == 7  # where it begins is drawn
    assert not torch.equal(tokens, torch.cat([b for b in speaker.batches(seed=1) if isinstance(b, Tensor)]))


def test_a_model_whose_outputs_see_later_tokens_gets_random_ones() -> None:
    torch.manual_seed(0)
    speaker = Speaker(Counting(whole=True), torch.zeros(1, 12, dtype=torch.int64))
    assert not speaker.speaks()
    tokens = torch.cat([batch for batch in speaker.batches() if isinstance(batch, Tensor)])
    counts = tokens.flatten().bincount(minlength=7) / tokens.numel()
    assert float((counts - 1 / 7).abs().max()) < 0.03


def test_what_is_not_tokens_is_repeated_and_long_sequences_are_few() -> None:
    torch.manual_seed(0)
    mask = torch.ones(2, 4096)
    mask[1, 100:] = 0
    example = {"tokens": torch.zeros(2, 4096, dtype=torch.int64), "mask": mask}
    batches = Speaker(Counting(whole=True), example).batches()
    assert sum(batch["tokens"].numel() for batch in batches if isinstance(batch, dict)) >= POSITIONS
    for batch in batches:
        assert isinstance(batch, dict)
        assert torch.equal(batch["mask"], mask[: len(batch["tokens"])])


class Two(nn.Module):
    """Takes exactly two sequences, of tokens that two embeddings read, and integers that none reads."""

    def __init__(self) -> None:
        super().__init__()
        self.many, self.few = nn.Embedding(100, 8), nn.Embedding(3, 8)
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        assert tokens.shape == (2, 5)
        read = self.many(tokens.view(-1, 5)) + self.few(tokens)
        return self.out(self.hidden(read[torch.arange(2), lengths]).relu())


def test_batches_are_as_large_as_the_model_takes_and_tokens_as_its_smallest_embedding() -> None:
    example = (torch.zeros(2, 5, dtype=torch.int64), torch.tensor([3, 4]))
    speaker = Speaker(Two(), example)
    assert [place.kinds for place in speaker.places] == [3]
    for batch in speaker.batches():
        tokens, lengths = batch
        assert tokens.shape == (2, 5)
        assert int(tokens.max()) <= 2
        assert torch.equal(lengths, example[1])


def test_a_model_without_embeddings_has_no_tokens() -> None:
    assert Speaker(nn.Linear(4, 2), torch.zeros(1, 4)).places == []
    assert Speaker(Counting(), (torch.zeros(1, 3, dtype=torch.int64), None)).places != []


def test_a_language_model_loses_less_on_what_it_says_itself() -> None:
    """And the plan says by what it was judged."""
    torch.manual_seed(1)
    kinds = 40
    model = nn.Sequential(nn.Embedding(kinds, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, kinds)).eval()
    with torch.no_grad():
        model[3].weight *= 6  # it is rather sure
    example = torch.zeros(1, 24, dtype=torch.int64)
    plan = nac.plan(model, example, params=0.7)
    assert "of tokens that the model itself says" in str(plan)
    every = torch.arange(kinds)[None]
    lost = {}
    for calibration in ("dream", "none"):
        small = nac.compress(model, example, width=0.3, calibration=calibration, refine=0)
        with torch.no_grad():
            lost[calibration] = float((small(every) - model(every)).square().mean())
    assert lost["dream"] < 0.8 * lost["none"]


@pytest.mark.parametrize("kind", ["tensor", "mapping"])
def test_random_tokens_are_said_to_be_random(kind: str) -> None:
    torch.manual_seed(0)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    plan = nac.plan(Counting(whole=True), tokens if kind == "tensor" else {"tokens": tokens}, params=0.8)
    assert "random tokens" in str(plan)


class Strict(Counting):
    """It checks its tokens."""

    def __init__(self, accepts: Callable[[Tensor], bool]) -> None:
        super().__init__(kinds=30)
        self.accepts = accepts

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.accepts(tokens):
            raise IndexError("not these tokens")
        return super().forward(tokens, mask)


SENTENCES = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 29], [3, 4, 5, 6, 7, 8, 9, 29]])


@pytest.mark.parametrize(
    ("accepts", "source"),
    [
        (lambda tokens: bool(((tokens == 29).sum(1) == 1).all()), "of random tokens"),  # one end of the sentence
        (lambda tokens: bool((tokens[:, 0] < 6).all() and (tokens[:, -1] == 29).all()), "of random tokens"),
        (lambda tokens: int(tokens.min()) > 2, "of tokens that the model itself says"),
        (lambda tokens: bool(torch.isin(tokens, SENTENCES).all()), "of tokens that the model itself says"),
        (
            lambda tokens: torch.equal(tokens, SENTENCES),
            r"^neurons are compared by .*\(ValueError: no tokens",
        ),
    ],
)
def test_tokens_that_the_model_does_not_take_are_not_made(accepts: Callable[[Tensor], bool], source: str) -> None:
    torch.manual_seed(0)
    plan = nac.plan(Strict(accepts), SENTENCES, params=0.7)
    assert re.search(source, plan.changes[0]), plan.changes


def test_large_batches_of_tokens_become_smaller_ones_if_the_model_takes_them() -> None:
    class Reader(nn.Module):
        def __init__(self, rows: int | None) -> None:
            super().__init__()
            self.embed, self.one, self.two = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 3)
            self.rows = rows

        def forward(self, ids: Tensor) -> Tensor:
            assert self.rows in (None, len(ids)), "another number of rows"
            return self.two(self.one(self.embed(ids)).relu())

    batches = [torch.randint(9, (10, 500)) for _ in range(9)]
    for rows, sizes in ((None, {4, 2}), (10, {10})):
        model = Reader(rows)
        graph = record(model, batches[0])
        evidence = gather(model, batches[0], graph.groups, batches)
        assert {len(batch) for batch in evidence.batches if isinstance(batch, Tensor)} == sizes
        assert sum(len(batch) for batch in (*evidence.batches, *evidence.judged) if isinstance(batch, Tensor)) == 90

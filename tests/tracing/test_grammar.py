"""Random networks: the record never fails, and what a plan promises holds."""

import torch
from grammar import SIZE_DEPENDENT, Block, build, kinds, networks
from hypothesis import HealthCheck, Phase, given, settings
from plans import prepared

from nac_gpu.testing import merge_copies, randomise

DEFECT = "merging identical neurons changed"  # what the trial says where a rule of the record was wrong


def reasons(blocks: list[Block], head: str) -> list[str]:
    """Why channels of a network are left alone; copies in all groups of its plan merge with no change."""
    torch.manual_seed(0)
    model = randomise(build(blocks, head)).eval()
    inputs = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    try:
        plan = prepared(model, inputs)
    except ValueError as error:
        if not str(error).startswith("nothing to compress: "):
            raise
        return str(error).removeprefix("nothing to compress: ").split("; ")
    for seed in (1, 2):
        assert merge_copies(plan.model, inputs, plan.choices, seed).error < 1e-8
    return [alone.reason for alone in plan.plan.left_alone]


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(networks())
def test_random_networks(drawn: tuple[list[Block], str]) -> None:
    """The trial finds nothing wrong either, where no movement depends on how many channels there are."""
    blocks, head = drawn
    why = reasons(blocks, head)
    used = kinds(blocks)
    if not used & SIZE_DEPENDENT:
        assert not [reason for reason in why if DEFECT in reason]

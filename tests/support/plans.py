"""Plans with what it takes to carry them out."""

from typing import Any

from torch import nn

from nac_gpu.planning.prepare import Prepared, plan_for
from nac_gpu.planning.request import Request
from nac_gpu.planning.taking import take


def prepared(model: nn.Module, inputs: Any, width: Any = 0.5) -> Prepared:
    """What `nac_gpu.plan` makes, before only the plan of it is given away."""
    return plan_for(take(model, inputs), Request(width=width))

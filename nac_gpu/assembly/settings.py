"""How neurons are merged: the arguments of `compress` that a plan does not contain."""

from dataclasses import dataclass
from typing import Literal, get_args

from nac_gpu.calibration.evidence import Evidence
from nac_gpu.clustering.methods import METHODS, AssignmentMethod, l1, ward
from nac_gpu.merging.centroids import Deviation
from nac_gpu.planning.request import checked_passes

#: How merged neurons and the weights of their consumers are computed: see `nac_gpu.compress`.
Rule = Literal["compensated", "restored", "centroid"]
#: How neurons are compared: see `nac_gpu.compress`.
Neurons = Literal["activations", "folded", "weights"]
#: How a group is made smaller: see `nac_gpu.compress`.
Method = Literal["auto", "ward", "removal", "mixed", "kmeans", "random", "l1"]


@dataclass(frozen=True)
class MergeSettings:
    """How neurons are merged: the arguments of `compress` that a plan does not contain.

    Attributes:
        method: name of the method; None for a function of the user.
        assign: assigns neurons to clusters.
        rule: how merged neurons and their consumers are computed.
        neurons: how neurons are compared; None to decide by the evidence.
        refine: passes of refinement over the calibration inputs.
        seed: of random methods and of refinement.
    """

    method: str | None
    assign: AssignmentMethod
    rule: Rule
    neurons: Neurons | None
    refine: int
    seed: int

    @staticmethod
    def of(
        method: str | AssignmentMethod, rule: Rule, neurons: Neurons | None, refine: int, seed: int
    ) -> "MergeSettings":
        """From the arguments of `compress`.

        Raises:
            ValueError: an unknown name, or a negative number of passes.
        """
        if isinstance(method, str) and method not in get_args(Method):
            known = ", ".join(get_args(Method))
            raise ValueError(f"unknown method {method!r}, expected one of {known}, or a function")
        for name, value, known in (("rule", rule, get_args(Rule)), ("neurons", neurons, (None, *get_args(Neurons)))):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(k for k in known if k)}")
        assign = METHODS.get(method, ward) if isinstance(method, str) else method
        if assign is l1 and neurons is None:
            neurons = "weights"
        own = method if isinstance(method, str) else None
        return MergeSettings(own, assign, rule, neurons, checked_passes(refine), seed)

    @property
    def looks_at_activations(self) -> bool:
        """Whether activations have to be observed."""
        return self.rule == "compensated" or self.neurons == "activations"

    @property
    def deviation(self) -> Deviation:
        """How the standard deviation of a merged channel with BatchNorm is chosen."""
        return "centroid" if self.rule == "centroid" else "restored"

    def arguments(self) -> dict[str, object]:
        """The arguments that must be equal on all ranks."""
        method = getattr(self.assign, "__qualname__", type(self.assign).__qualname__)
        values = {name: value for name, value in vars(self).items() if name != "assign"}
        return {**values, "method": self.method or method}


def compensates(evidence: Evidence | None, settings: MergeSettings) -> bool:
    """Whether consumers are refitted."""
    return settings.rule == "compensated" and evidence is not None and bool(evidence.batches)

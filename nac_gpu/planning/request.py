"""The request of the user: widths, budgets of parameters, FLOPs or latency, limits, and names of layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nac_gpu.calibration.batches import Calibration

#: How many neurons to keep: one share for all groups, or numbers (int) and shares (float) by names of layers.
Width = float | Mapping[str, int | float]
#: Names of layers, names of modules that contain layers, or patterns.
Names = Sequence[str] | None
#: A budget: a share of the model's own cost (float), or an absolute number (int).
Share = int | float
#: Fewest and most neurons of a layer, each a number (int) or a share (float).
LimitsByLayer = Mapping[str, tuple[int | float, int | float]]


@dataclass(frozen=True)
class Limits:
    """The range of widths of a group.

    Attributes:
        least: fewest neurons.
        most: most neurons.
        step: widths are multiples of this, or one of the limits.
    """

    least: int
    most: int
    step: int = 1

    def allowed(self, widths: Sequence[int]) -> list[int]:
        """These widths, rounded to the step and within the limits, ascending, with both limits."""
        rounded = {max(self.step, round(width / self.step) * self.step) for width in widths}
        inside = {width for width in rounded if self.least <= width <= self.most}
        return sorted(inside | {self.least, self.most})


@dataclass(frozen=True)
class Request:
    """How small the model has to become, and the inputs used to decide where to save.

    Attributes:
        width: how many neurons to keep. A single number is a share in (0, 1] for every group. A mapping from names (of
            a layer, of a module that contains layers, or a pattern such as `"features.*"`) gives a number of neurons
            (int) or a share (float); layers that it does not name keep their width. Together with a budget, a single
            number is the maximum share of every group, and layers named in a mapping are fixed while the widths of
            the others are chosen.
        params: budget for the parameters of the whole model: a share (float) or an absolute number (int).
        flops: the same for the FLOPs of a forward pass on the example inputs.
        latency: the same for the time of that pass, as a share (float) of the model's own. Networks of several sizes
            are timed in turn with the model, on its device (see `nac_gpu.planning.latency`). Several budgets may be
            combined.
        limits: for a budget, fewest and most neurons of layers (named as in `width`), as numbers or shares.
        multiple_of: for a budget, chosen widths are multiples of this. By default 8 on CUDA, where other widths are
            slow, and for a latency budget; else 1.
        only: names as in `width`; nothing else is compressed.
        skip: names as in `width`; these are not compressed.
        calibration: inputs for choosing widths, comparing neurons and compensation. Batches of unlabelled inputs, such
            as a list of tensors or a DataLoader (a few hundred inputs; labels are ignored); `"dream"` for synthetic
            inputs where the model allows it (see `nac_gpu.calibration.dream` and `nac_gpu.calibration.tokens`), else
            the same as `"none"`; `"none"` to use only the weights, which is quick.
        seed: of synthetic inputs and of random methods; the global random state is not touched.
    """

    width: Width | None = None
    params: Share | None = None
    flops: Share | None = None
    latency: float | None = None
    limits: LimitsByLayer | None = None
    multiple_of: int | None = None
    only: Names = None
    skip: Names = ()
    calibration: Calibration = "dream"
    seed: int = 0

    @property
    def budget(self) -> bool:
        """Whether widths have to be chosen to meet a budget."""
        return self.params is not None or self.flops is not None or self.latency is not None

    @property
    def says_how_small(self) -> bool:
        """Whether it contains anything that defines widths."""
        return self.budget or self.width is not None or self.limits is not None or self.multiple_of is not None

    def check(self) -> None:
        """Check the request by itself, without a model.

        Raises:
            ValueError: neither widths nor a budget are given, or a value is out of range.
        """
        if self.width is None and not self.budget:
            raise ValueError("expected width=, params=, flops= or latency= (or a plan, to compress), got none of them")
        if not self.budget and (self.limits is not None or self.multiple_of is not None):
            raise ValueError("limits= and multiple_of= are for budgets, expected params=, flops= or latency= too")
        if self.multiple_of is not None and self.multiple_of < 1:
            raise ValueError(f"multiple_of={self.multiple_of}, expected at least 1")
        for name, value in (("params", self.params), ("flops", self.flops)):
            if value is None:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and value >= 1) and not (isinstance(value, float) and 0 < value <= 1):
                raise ValueError(
                    f"{name}={value!r}, expected the share to keep (a float, more than 0 and at most 1) "
                    "or a number (an int, at least 1)"
                )
        if self.latency is not None and not (isinstance(self.latency, float) and 0 < self.latency < 1):
            raise ValueError(
                f"latency={self.latency!r}, expected the share of the model's own time (a float, more than 0 and less "
                "than 1)"
            )

    def check_beside_plan(self) -> None:
        """Check that the request contains nothing that a given plan has decided already.

        Raises:
            ValueError: it does.
        """
        if self.says_how_small:
            raise ValueError("expected either a plan or width=, params=, flops= or latency=, got both")
        if self.only is not None or self.skip:
            raise ValueError(
                "only= and skip= are part of a plan, expected them in nac_gpu.plan(...), got them beside a plan"
            )

    def arguments(self) -> dict[str, object]:
        """The arguments that must be equal on all ranks: all but the calibration data."""
        return {name: value for name, value in vars(self).items() if name != "calibration"}

    def most(self, parameters: int, flops: int) -> tuple[float, float]:
        """The budget for parameters and FLOPs, given those of the model; infinity for no limit."""
        return _most(self.params, parameters), _most(self.flops, flops)


def _most(share: Share | None, whole: int) -> float:
    if share is None:
        return float("inf")
    return float(share) if isinstance(share, int) else share * whole

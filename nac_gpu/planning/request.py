"""What the user asks for: widths by layer, shares of parameters, FLOPs or time, limits, names of layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nac_gpu.calibration.batches import Calibration

#: How many neurons to keep: one share of all, or numbers (int) and shares (float) by the names of layers.
Width = float | Mapping[str, int | float]
#: Names of layers, of modules that hold layers, or patterns.
Names = Sequence[str] | None
#: What may be spent: a share of the model's own (float), or a number (int).
Share = int | float
#: Fewest and most neurons of a layer, each a number (int) or a share (float).
LimitsByLayer = Mapping[str, tuple[int | float, int | float]]


@dataclass(frozen=True)
class Limits:
    """Between which widths a group may end.

    Attributes:
        least: fewest neurons.
        most: most neurons.
        step: a width is a multiple of this, or one of the limits.
    """

    least: int
    most: int
    step: int = 1

    def allowed(self, widths: Sequence[int]) -> list[int]:
        """The widths among these that may be taken, ascending, with both limits."""
        rounded = {max(self.step, round(width / self.step) * self.step) for width in widths}
        inside = {width for width in rounded if self.least <= width <= self.most}
        return sorted(inside | {self.least, self.most})


@dataclass(frozen=True)
class Request:
    """What the user asks for: how small the model is to become, and by what that is judged.

    Attributes:
        width: how many neurons to keep. One number is the share of every group's neurons that is kept, in (0, 1]. A
            mapping goes from names (of a layer, of a module that holds layers, or a pattern such as `"features.*"`) to
            a number of neurons (int) or a share (float); layers that it does not name keep their width. Beside a
            budget, one number is the most that any group keeps, and the layers that a mapping names are fixed while
            the others are chosen.
        params: the parameters of the whole model after: a share of those before (float), or a number (int).
        flops: the same for the operations of a forward pass on the example inputs.
        latency: the same for the time of that pass, a share of the model's own (float), measured by timing networks
            of several sizes in turn with the model, where it is (see `nac_gpu.planning.latency`). Budgets may be given
            together.
        limits: for a budget, the fewest and most neurons of layers (by names as in `width`), numbers or shares.
        multiple_of: for a budget, widths are multiples of this; by default 8 on CUDA, where odd widths are slow, and
            for a latency, else 1.
        only: names as in `width`: nothing else is compressed.
        skip: the same, of what is not compressed.
        calibration: by what a budget judges neurons, and on what they are compared and compensated: batches of
            unlabelled inputs, such as a list of tensors or a DataLoader (a few hundred inputs; labels beside them are
            not used); `"dream"` for synthetic inputs where the model can make some (see `nac_gpu.calibration.dream`
            and `nac_gpu.calibration.tokens`), else as `"none"`; `"none"` for the weights alone, which is quick.
        seed: of synthetic inputs, and of methods that draw numbers; the global random state is not touched.
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
        """Widths are to be chosen."""
        return self.params is not None or self.flops is not None or self.latency is not None

    @property
    def says_how_small(self) -> bool:
        """Something in it makes a plan, or is part of one."""
        return self.budget or self.width is not None or self.limits is not None or self.multiple_of is not None

    def check(self) -> None:
        """Whether this makes sense by itself.

        Raises:
            ValueError: nothing is asked for, or what is asked for is out of range.
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
        """Whether nothing here contradicts a plan that is given, too.

        Raises:
            ValueError: something does.
        """
        if self.says_how_small:
            raise ValueError("expected either a plan or width=, params=, flops= or latency=, got both")
        if self.only is not None or self.skip:
            raise ValueError(
                "only= and skip= are part of a plan, expected them in nac_gpu.plan(...), got them beside a plan"
            )

    def arguments(self) -> dict[str, object]:
        """What can be compared between ranks: all but the calibration data."""
        return {name: value for name, value in vars(self).items() if name != "calibration"}

    def most(self, parameters: int, flops: int) -> tuple[float, float]:
        """Parameters and operations that may be spent, of a model that has these."""
        return _most(self.params, parameters), _most(self.flops, flops)


def _most(share: Share | None, whole: int) -> float:
    if share is None:
        return float("inf")
    return float(share) if isinstance(share, int) else share * whole

"""The request of the user: widths, budgets of parameters, FLOPs or latency, limits, and names of layers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from nac_gpu.calibration.batches import Calibration

#: How many neurons to keep: one share for all groups, or numbers (int) and shares (float) by names of layers.
Width = float | Mapping[str, int | float]
#: Names of layers, names of modules that contain layers, or patterns.
Names = Sequence[str] | None
#: A budget: a share of the model's own cost (float), or an absolute number (int).
Share = int | float
#: Fewest and most neurons of a layer, each a number (int) or a share (float).
LimitsByLayer = Mapping[str, tuple[int | float, int | float]]


def number(value: Any) -> Any:
    """A number of any library as an int or a float: NumPy's, and tensors of zero dimensions; all else unchanged.

    >>> nac_gpu.planning.request.number(torch.tensor(8))
    8
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _numbers(value: Any) -> Any:
    """The same for the numbers in mappings and pairs."""
    if isinstance(value, Mapping):
        return {key: _numbers(item) for key, item in value.items()}
    return tuple(map(number, value)) if isinstance(value, list | tuple) else number(value)


def checked_seed(value: object) -> int:
    """A seed as an int.

    Raises:
        ValueError: it is not an integer of 64 bits.
    """
    seed = number(value)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={value!r}, expected an integer of 64 bits")
    return seed


def checked_passes(value: object) -> int:
    """The argument `refine` as an int.

    Raises:
        ValueError: it is not an integer, or negative.
    """
    passes = number(value)
    if not isinstance(passes, int) or passes < 0:
        raise ValueError(f"refine={value!r}, expected a number of passes over the calibration inputs, 0 for none")
    return int(passes)


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

    Numbers may be those of NumPy, or tensors of zero dimensions; they are kept as int and float.

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
        multiple_of: for a budget, chosen widths are multiples of this, and layers with fewer neurons keep all of them,
            unless `limits` or `width` say otherwise. It is halved, and the plan says so, if the budget cannot be met
            otherwise. By default 8 on CUDA, where other widths are slow, and for a latency budget; else 1.
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

    def __post_init__(self) -> None:
        for name in ("width", "params", "flops", "latency", "limits", "multiple_of", "seed"):
            object.__setattr__(self, name, _numbers(getattr(self, name)))
        for name in ("only", "skip"):
            names = getattr(self, name)
            if isinstance(names, Iterable) and not isinstance(names, str):
                object.__setattr__(self, name, tuple(names))  # it is read several times

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
        checked_seed(self.seed)
        step = self.multiple_of
        if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 1):
            raise ValueError(f"multiple_of={step!r}, expected at least 1 (an int)")
        if isinstance(self.width, bool) or not isinstance(self.width, int | float | Mapping | None):
            raise ValueError(
                f"width={self.width!r}, expected a share (a float) for all layers, or a mapping from names of layers "
                "to numbers of neurons (int) or shares (float)"
            )
        if not isinstance(self.limits, Mapping | None):
            raise ValueError(f"limits={self.limits!r}, expected a mapping from names of layers to pairs")
        for name, given in (("width", self.width), ("limits", self.limits)):
            for key in given if isinstance(given, Mapping) else ():
                if not isinstance(key, str):
                    raise ValueError(
                        f"{name}= names a layer {key!r}, expected its name in the model, such as {str(key)!r}"
                    )
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
            ValueError: it does, or the seed is not an integer.
        """
        checked_seed(self.seed)
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

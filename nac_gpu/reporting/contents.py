"""The contents of a report: all measured values, so that writing it needs neither the models nor the data."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nac_gpu.calibration.curves import Curve, loss_at
from nac_gpu.clustering.dendrogram import Dendrogram
from nac_gpu.files.atomic import write_text
from nac_gpu.network.timing import Timing
from nac_gpu.planning.plans import GroupPlan, Plan
from nac_gpu.reporting.measuring import Accuracy


@dataclass(frozen=True)
class Size:
    """The size of a model.

    Attributes:
        parameters: as `nac_gpu.cost` counts them.
        flops: of one forward pass on the example inputs, as `nac_gpu.cost` counts them.
        bytes: size of its state dict as `torch.save` writes it.
    """

    parameters: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class GroupCurve:
    """The error curve of one group.

    Attributes:
        group: its plan.
        errors: lost share of a variance, 0 to 1, by the number of neurons kept.
        by_activations: the variance is that of the consumers' outputs, after they are refitted; else the share of the
            variance of the neurons' weights within clusters.
    """

    group: GroupPlan
    errors: Curve
    by_activations: bool

    @property
    def error(self) -> float:
        """The error at the chosen width."""
        return loss_at(self.errors, self.group.after)


@dataclass(frozen=True, eq=False)
class Tree:
    """The dendrogram of one group.

    Attributes:
        group: its plan.
        dendrogram: of its neurons, on the CPU.
        labels: int64 [n], the cluster of each neuron at the chosen width.
    """

    group: GroupPlan
    dendrogram: Dendrogram
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Filters:
    """The filters of a layer that reads images.

    Attributes:
        layer: its name.
        before: filters of the original, float32 [n, height, width, colours] on the CPU, with 1 or 3 colours.
        after: filters of the compressed model, [k, height, width, colours]; None if they differ from the merged ones.
        clusters: for each filter of the compressed model, the original filters that were merged into it.
    """

    layer: str
    before: Tensor
    after: Tensor | None
    clusters: tuple[tuple[int, ...], ...]

    def merged(self) -> list[int]:
        """The clusters of more than one filter, ordered by their weakest filter: the weakest ones look like noise."""
        norms = self.before.flatten(1).norm(dim=1)
        several = [number for number, members in enumerate(self.clusters) if len(members) > 1]
        return sorted(several, key=lambda number: -float(norms[list(self.clusters[number])].min()))


@dataclass(frozen=True, eq=False)
class Report:
    """The report of a compression, made by `nac_gpu.report`.

    Attributes:
        title: headline.
        inputs: shapes of the example inputs.
        plan: groups, widths, and what was left alone.
        before: size of the original.
        after: size of the compressed model.
        timings: at each batch size.
        accuracy: on the data set, if one was given.
        curves: error curves of the groups.
        tree: dendrogram of the chosen layer.
        filters: of the first layer, or the reason why there are none to show.
        evidence: one line that says how neurons were compared.
        environment: processor, threads, versions.
        notes: measurements that failed, and why.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> small = nac_gpu.compress(model, torch.zeros(1, 8), width=0.25, calibration="none")
    >>> found = nac_gpu.report(model, small, torch.zeros(1, 8), calibration="none", timed={})
    >>> found.save("report.html")
    >>> print(found.to_text().splitlines()[4])
    | parameters      |      420 |        108 | 3.89× |
    """

    title: str
    inputs: str
    plan: Plan
    before: Size
    after: Size
    timings: tuple[Timing, ...]
    accuracy: Accuracy | None
    curves: tuple[GroupCurve, ...]
    tree: Tree
    filters: Filters | str
    evidence: str
    environment: Mapping[str, str | int]
    notes: tuple[str, ...] = ()

    def to_html(self) -> str:
        """A self-contained HTML page, without scripts or external files. Its pictures need matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from nac_gpu.reporting.page import html

        return html(self)

    def to_text(self) -> str:
        """The numbers as plain text with Markdown tables."""
        from nac_gpu.reporting.text import plain_text

        return plain_text(self)

    def to_json(self) -> str:
        """All numbers, with all error curves and SciPy's linkage matrix. Units: seconds, bytes, shares from 0 to 1."""
        return json.dumps(self._values(), indent=2, ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        """Write the report atomically: if the process stops, the file is either the old one or the complete new one.

        Args:
            path: its suffix defines the format: `.html`, `.txt`, `.md` or `.json`. Missing folders are created.

        Raises:
            ValueError: another suffix.
            ImportError: as `to_html`.
        """
        path = Path(path)
        writers = {".html": self.to_html, ".txt": self.to_text, ".md": self.to_text, ".json": self.to_json}
        if path.suffix.lower() not in writers:
            raise ValueError(f"{path.name} does not say what to write, expected a name in {', '.join(writers)}")
        write_text(writers[path.suffix.lower()]().rstrip("\n") + "\n", path)

    def _values(self) -> dict[str, Any]:
        tree = self.tree
        filters: dict[str, Any] = {"left_out": self.filters}
        if isinstance(self.filters, Filters):
            filters = {"layer": self.filters.layer, "clusters": self.filters.clusters}
        timings = [
            asdict(timing) | dict(zip(("throughput_before", "throughput_after"), timing.throughput, strict=True))
            for timing in self.timings
        ]
        return {
            "title": self.title,
            "inputs": self.inputs,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "timings": timings,
            "accuracy": None if self.accuracy is None else asdict(self.accuracy),
            "plan": asdict(self.plan),
            "curves": [
                {
                    "group": curve.group.name,
                    "kept": curve.group.after,
                    "error": curve.error,
                    "by_activations": curve.by_activations,
                    "errors": [{"kept": kept, "error": error} for kept, error in sorted(curve.errors.items())],
                }
                for curve in self.curves
            ],
            "dendrogram": {
                "group": tree.group.name,
                "linkage": tree.dendrogram.to_scipy().tolist(),
                "labels": tree.labels.tolist(),
            },
            "filters": filters,
            "evidence": self.evidence,
            "environment": dict(self.environment),
            "notes": self.notes,
        }

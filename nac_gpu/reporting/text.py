"""Human-readable numbers, tables, and the report as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nac_gpu.network.timing import Spread, Timing
from nac_gpu.reporting.measuring import Accuracy
from nac_gpu.tracing.graph import LeftAlone

if TYPE_CHECKING:
    from nac_gpu.reporting.contents import GroupCurve, Report


#: Name of a measurement, its value for the original and for the compressed model, and their ratio.
Row = tuple[str, str, str, str]
HEADER: Row = ("", "original", "compressed", "ratio")


def percent(share: float, digits: int = 1) -> str:
    """A share from 0 to 1 as a percentage, such as `12.3 %`."""
    return f"{100 * share:.{digits}f} %"


def lost(error: float) -> str:
    """An error as a percentage, with an additional digit if it is small."""
    return percent(error, 1 if error >= 0.01 or not error else 2)


def seconds(value: float) -> str:
    """A time in s, ms or µs, with three digits."""
    unit, scale = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("µs", 1e6)
    return f"{_three(value * scale)} {unit}"


def byte_count(value: int) -> str:
    """A number of bytes in B, kB, MB or GB, with three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{_three(value / scale)} {unit}"
    return f"{value} B"


def count(value: float) -> str:
    """A large number with a suffix k, M, G or T, and three digits."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{_three(value / scale)} {unit}"
    return _three(value)


def times(ratio: float) -> str:
    """A ratio such as `4.20×`."""
    return f"{_three(ratio) if ratio < 10 else f'{ratio:,.0f}'}\N{MULTIPLICATION SIGN}"


def _three(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(value: Spread) -> str:
    """The median, with the 20th and 80th percentiles."""
    return f"{seconds(value.median)} ({seconds(value.low)} to {seconds(value.high)})"


def before_and_after(report: Report) -> list[Row]:
    """All measurements of both models."""
    before, after = report.before, report.after
    rows: list[Row] = [
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}", ratio(before.parameters, after.parameters)),
        ("FLOPs of a pass", f"{before.flops:,}", f"{after.flops:,}", ratio(before.flops, after.flops)),
        ("size on disk", byte_count(before.bytes), byte_count(after.bytes), ratio(before.bytes, after.bytes)),
    ]
    for timing in report.timings:
        rows += _timed(timing)
    if report.accuracy is not None:
        rows.append(_right(report.accuracy))
    return rows


def ratio(before: int, after: int) -> str:
    """The ratio of before to after; a dash if after is zero."""
    return times(before / after) if after else "-"


def _timed(timing: Timing) -> list[Row]:
    label, faster = f"batch {timing.batch:,}", timing.speedup
    before, after = (throughput(timing.batch, latency) for latency in (timing.before, timing.after))
    compared = f"{times(faster.median)} ({times(faster.low)} to {times(faster.high)})"
    return [
        (f"latency, {label}", spread(timing.before), spread(timing.after), compared),
        (f"throughput, {label}", before, after, times(faster.median)),
    ]


def _right(accuracy: Accuracy) -> Row:
    shares = zip((accuracy.before, accuracy.after), accuracy.deviations, strict=True)
    before, after = (f"{percent(share, 2)} ± {100 * deviation:.2f}" for share, deviation in shares)
    return ("accuracy", before, after, f"{points(accuracy)} points")


def throughput(batch: int, latency: Spread) -> str:
    """Inputs per second, with their spread, from the seconds of a batch."""
    middle, low, high = (f"{batch / value:,.{0 if batch / value >= 100 else 1}f}" for value in vars(latency).values())
    return f"{middle}/s ({high} to {low})"


def points(accuracy: Accuracy) -> str:
    """The change of the accuracy in percentage points."""
    return f"{100 * (accuracy.after - accuracy.before):+.2f}".replace("-", "\N{MINUS SIGN}")


def explanations(report: Report) -> list[str]:
    """Sentences that explain how the numbers were measured."""
    lines = [f"FLOPs are those of one pass on the example inputs: {report.inputs}; 2 per multiply-add."]
    if report.timings:
        rounds = ", ".join(f"{timing.rounds} at batch {timing.batch:,}" for timing in report.timings)
        lines.append(
            "Both models were timed in turn on this machine, in eval mode, after warming up: medians, and where 20 % "
            f"and 80 % of the values lie. Passes of each: {rounds}."
        )
    if report.accuracy is not None:
        lines.append(
            f"Accuracy on {report.accuracy.labels:,} labels, ± the standard deviation that so many leave open. Both "
            f"models give the same answer for {percent(report.accuracy.agreement, 2)} of them."
        )
    return [*lines, *(f"{note}." for note in report.notes)]


def by_reason(left_alone: Iterable[LeftAlone]) -> dict[str, list[LeftAlone]]:
    """What was left alone, grouped by reason."""
    found: dict[str, list[LeftAlone]] = {}
    for alone in left_alone:
        found.setdefault(alone.reason, []).append(alone)
    return found


def machine(report: Report) -> str:
    """The machine and the versions, in one line."""
    return ", ".join(f"{name}: {value}" for name, value in report.environment.items())


def lost_of(curve: GroupCurve) -> str:
    """The quantity whose variance is lost in an error curve."""
    return "its consumers' outputs" if curve.by_activations else "its weights"


def plain_text(report: Report) -> str:
    """The report as plain text with Markdown tables."""
    errors = [
        [curve.group.name, f"{curve.group.before:,}", f"{curve.group.after:,}", lost(curve.error), lost_of(curve)]
        for curve in report.curves
    ]
    parts = [
        report.title,
        table(HEADER, before_and_after(report)),
        "\n".join(explanations(report)),
        "Groups, widths, and what was left alone",
        str(report.plan),
        "What merging costs at these widths",
        table(["group", "neurons", "kept", "lost", "of the variance of"], errors),
        f"neurons: {report.evidence}",
        f"machine: {machine(report)}",
    ]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "| " + " | ".join(padded) + " |"

    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(ruler), *(line(row) for row in cells[1:])])

"""The report as a self-contained HTML page: no scripts, light and dark mode, for phones and desktops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from nac_gpu.reporting.contents import Filters
from nac_gpu.reporting.pictures import curve, dendrogram, png
from nac_gpu.reporting.text import (
    HEADER,
    before_and_after,
    by_reason,
    byte_count,
    count,
    explanations,
    lost,
    lost_of,
    machine,
    percent,
    points,
    ratio,
    seconds,
    times,
)

if TYPE_CHECKING:
    from nac_gpu.reporting.contents import GroupCurve, Report


_CURVES = 24  # most error curves that are drawn; the text and the JSON contain all
_CLUSTERS, _MEMBERS = 36, 8  # most clusters of filters that are drawn, and most filters of each
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def html(report: Report) -> str:
    """The report as one page of HTML.

    Raises:
        ImportError: matplotlib is not installed.
    """
    sections = [
        _head(report),
        _measured(report),
        _widths(report),
        _curves(report.curves),
        _dendrogram(report),
        _filters(report.filters),
        _left_alone(report),
        f"<footer>{escape(machine(report))}</footer>",
    ]
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return _PAGE.format(title=f"{escape(report.title)}", style=style, body="\n".join(sections))


def _head(report: Report) -> str:
    before, after = report.before, report.after
    tiles = [
        _tile(
            ratio(before.parameters, after.parameters),
            "fewer parameters",
            count(before.parameters),
            count(after.parameters),
        ),
        _tile(ratio(before.flops, after.flops), "fewer FLOPs", count(before.flops), count(after.flops)),
        _tile(ratio(before.bytes, after.bytes), "smaller on disk", byte_count(before.bytes), byte_count(after.bytes)),
    ]
    if report.timings:
        timing = report.timings[0]
        label = f"the speed, batch {timing.batch:,}"
        tiles.append(
            _tile(times(timing.speedup.median), label, seconds(timing.before.median), seconds(timing.after.median))
        )
    if report.accuracy is not None:
        shares = (percent(share, 2) for share in (report.accuracy.before, report.accuracy.after))
        tiles.append(_tile(points(report.accuracy), "points of accuracy", *shares))
    merged = sum(group.after < group.before for group in report.plan.groups)
    lede = (
        f"{merged:,} of {_several(len(report.plan.groups), 'group')} of neurons made smaller by merging similar ones; "
        f"inputs {escape(report.inputs)}."
    )
    return (
        f'<header>\n<h1>{escape(report.title)}</h1>\n<p class="lede">{lede}</p>\n'
        f'<dl class="tiles">\n{"".join(tiles)}</dl>\n</header>'
    )


def _tile(big: str, label: str, before: str, after: str) -> str:
    return f'<div><dt>{label}</dt><dd class="big">{big}</dd><dd class="small">{before} → {after}</dd></div>\n'


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int], css: str, label: str) -> str:
    """A table of HTML cells; the first cell of each row is its heading.

    Args:
        header: of the columns.
        rows: of cells.
        numbers: columns that contain numbers.
        css: class of the box around it: on small screens it scrolls, or its cells are stacked (`stack`, `cells`).
        label: for screen readers.
    """
    style = [' class="number"' if column in numbers else "" for column in range(len(header))]
    head = "".join(f'<th scope="col"{kind}>{cell}</th>' for cell, kind in zip(header, style, strict=True))
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(
            f'<td{kind} data-label="{column}">{cell}</td>'
            for cell, kind, column in zip(row[1:], style[1:], header[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    )
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return f'<div class="scroll {css}" role="region" aria-label="{label}" tabindex="0">{table}</div>'


def _measured(report: Report) -> str:
    rows = [[escape(cell) for cell in row] for row in before_and_after(report)]
    notes = "".join(f"<li>{escape(line)}</li>" for line in explanations(report))
    return _section(
        "Before and after",
        _table(HEADER, rows, (1, 2, 3), "stack", "before and after"),
        f'<ul class="notes">{notes}</ul>',
    )


def _widths(report: Report) -> str:
    rows = []
    for group, found in zip(report.plan.groups, report.curves, strict=True):
        name = _name(group.name) + (" (heads or groups)" if group.units else "")
        others = [_name(layer) for layer in group.layers if layer != group.name]
        if others:
            name += f'<div class="faint">with {_folded(others, 3)}</div>'
        rows.append(
            [
                name,
                f"{group.before:,}",
                f"{group.after:,}",
                _bar(group.after / group.before),
                f"{group.parameters_before:,}",
                f"{group.parameters_after:,}",
                lost(found.error),
            ]
        )
    header = ("group", "neurons", "kept", "", "parameters", "after", "lost")
    changes = "".join(f"<li>{escape(change)}</li>" for change in report.plan.changes)
    return _section(
        "Widths",
        "<p>Layers that share their neurons are one group. A weight between two groups counts for both. What is "
        "lost at these widths is explained below.</p>",
        _table(header, rows, (1, 2, 4, 5, 6), "tall cells", "widths"),
        f'<ul class="notes">{changes}</ul>' if changes else "",
    )


def _curves(curves: Sequence[GroupCurve]) -> str:
    dearest = sorted(range(len(curves)), key=lambda number: -curves[number].error)[:_CURVES]
    figures = []
    for number in sorted(dearest):
        found = curves[number]
        cut = f"{found.group.before:,} → {found.group.after:,}, {lost(found.error)} lost"
        figures.append(
            f"<figure><figcaption><b>{_name(found.group.name)}</b> {cut}</figcaption>\n"
            f"{curve(found, f'c{number}')}</figure>\n"
        )
    kinds = dict.fromkeys(lost_of(found) for found in curves)
    meaning = (
        "<p>The share of a variance that is lost with so many neurons kept: of "
        + ", or where that cannot be seen of ".join(
            {"its consumers' outputs": "the outputs of the layers that read the group, after they are refitted"}.get(
                kind, "the neurons' weights, within clusters"
            )
            for kind in kinds
        )
        + ". The dot is the width that was chosen.</p>"
    )
    rest = len(curves) - len(figures)
    some = f"The {len(figures)} groups that lost most; the JSON report has the curves of the other {rest:,}."
    parts = [meaning, f"<p>{some}</p>" if rest else "", f'<div class="curves">\n{"".join(figures)}</div>']
    return _section("What merging costs", *parts)


def _dendrogram(report: Report) -> str:
    tree = report.tree
    cut = "All of them were kept" if tree.group.after == tree.group.before else "Merges below the cut are blue"
    caption = f"The neurons of <b>{_name(tree.group.name)}</b> by Ward's method. {cut}; {escape(report.evidence)}."
    box = '<div class="scroll wide" role="region" aria-label="dendrogram" tabindex="0">'
    picture = f"{box}{dendrogram(tree, 'tree')}</div>"
    return _section("Dendrogram", f"<figure>{picture}\n<figcaption>{caption}</figcaption></figure>")


def _filters(filters: Filters | str) -> str:
    title = "Filters of the first layer"
    if isinstance(filters, str):
        return _section(title, f"<p>Left out: {escape(filters)}.</p>")
    merged = filters.merged()
    items = []
    for cluster in merged[:_CLUSTERS]:
        members = filters.clusters[cluster]
        shown = [_picture(filters.before[member], f"filter {member}") for member in members[:_MEMBERS]]
        if len(members) > _MEMBERS:
            shown.append(f'<span class="more">+ {len(members) - _MEMBERS:,}</span>')
        if filters.after is not None:
            result = _picture(filters.after[cluster], f"merged filter {cluster}", "result")
            shown.append(f"<span>→ {result}</span>")
        items.append(f"<li>{''.join(shown)}</li>\n")
    height, width = filters.before.shape[1:3]
    caption = f"<p>Filters of {_name(filters.layer)} that were merged stand together"
    caption += ", and behind the arrow what they became. " if filters.after is not None else ". "
    caption += f"{_several(len(merged), 'cluster')} of more than one filter"
    caption += f", the {_CLUSTERS} strongest are shown" if len(merged) > _CLUSTERS else ""
    caption += "; each filter is as bright as it can be, grey is zero.</p>"
    if filters.after is None:
        caption += (
            "<p>The compressed model's own filters are not these merged ones: it was made with other options, or has "
            "been trained far since.</p>"
        )
    return _section(title, caption, f'<ul class="clusters" style="--ratio:{width}/{height}">\n{"".join(items)}</ul>')


def _picture(values: object, label: str, css: str = "") -> str:
    return f'<img class="{css}" alt="{label}" title="{label}" src="{png(values)}">'


def _left_alone(report: Report) -> str:
    alone = report.plan.left_alone
    if not alone:
        return _section("Left alone", "<p>Nothing: every channel belongs to a group.</p>")
    rows = []
    for reason, found in by_reason(alone).items():
        names = [f"{_name(item.layer)} ({item.size:,})" for item in found]
        rows.append([escape(reason), _folded(names, 12), f"{sum(item.size for item in found):,}"])
    remedies = dict.fromkeys(item.remedy for item in alone if item.remedy)
    advice = "".join(f"<li>To compress more: {escape(remedy)}.</li>" for remedy in remedies)
    return _section(
        "Left alone, and why",
        _table(("reason", "layers", "channels"), rows, (2,), "stack", "left alone"),
        f'<ul class="notes">{advice}</ul>' if advice else "",
    )


def _name(layer: str) -> str:
    """A layer's name as HTML that may break after a dot."""
    return escape(layer).replace(".", ".<wbr>")


def _folded(names: Sequence[str], most: int) -> str:
    """A list of names (HTML), of which all but the first `most` are folded away."""
    shown, hidden = ", ".join(names[:most]), names[most:]
    if not hidden:
        return shown
    return f"{shown} <details><summary>and {len(hidden):,} more</summary>{', '.join(hidden)}</details>"


def _bar(share: float) -> str:
    style = f"width:{100 * share:.1f}%"
    return f'<span class="bar" role="img" aria-label="{percent(share, 0)} kept"><span style="{style}"></span></span>'


def _several(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"

"""Pictures as inline SVG: text and axes have the page's text colour, so they are readable in light and dark mode."""

import base64
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from nac_gpu.reporting.contents import GroupCurve, Tree
from nac_gpu.reporting.text import lost

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_TEXT = "#010203"  # placeholder, replaced by the page's text colour
_LINE, _CUT = "#3f8fd2", "#d9772b"  # readable on white and on black
_LEAVES = 1024  # most branches of a dendrogram that are drawn
_NUMBERED = 40  # most leaves that get a number
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nac_gpu",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _TEXT,
    "text.parse_math": False,
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


@contextmanager
def _figure(
    size: tuple[float, float], place: tuple[float, float, float, float], name: str, label: str, out: list[str]
) -> Iterator["Axes"]:
    """Axes to draw on; the picture is appended to `out` as SVG.

    Args:
        size: width and height in inches.
        place: of the axes: left, bottom, width and height as shares (automatic layout is slow).
        name: makes identifiers unique in the page.
        label: for screen readers.
        out: gets the SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the report's pictures need matplotlib, which is not installed: pip install 'nac-gpu[cli]'; "
            "to_text() and to_json() do without"
        ) from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size)
        yield figure.add_axes(place)
        written = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    out.append(_inline(written.getvalue(), name, label))


def _inline(svg: str, name: str, label: str) -> str:
    """An SVG file as an element of a page: unique identifiers, no XML namespaces, which HTML does not need."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return re.sub(r"\n\s*", "\n", svg.replace(_TEXT, "currentColor"))


def curve(found: GroupCurve, name: str) -> str:
    """The error curve of a group, with the chosen width: SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    group, out = found.group, []
    label = f"Cost curve of {group.name}: {lost(found.error)} lost at {group.after} of {group.before} neurons"
    kept = sorted(found.errors)
    with _figure((2.9, 1.75), (0.19, 0.26, 0.78, 0.7), name, label, out) as axes:
        axes.plot(kept, [100 * found.errors[k] for k in kept], color=_LINE, linewidth=1.6)
        axes.axvline(group.after, color=_CUT, linewidth=1, linestyle=(0, (3, 2)))
        axes.plot([group.after], [100 * found.error], "o", color=_CUT, markersize=5, clip_on=False, zorder=3)
        axes.set_xscale("log", base=2)
        step = 2 if group.before <= 32 else 4 if group.before <= 512 else 8
        ticks = [step**power for power in range(16) if step**power <= group.before]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlim=(0.9, group.before * 1.1), ylim=(0, 104), xlabel="neurons kept", ylabel="lost, %")
        axes.set_yticks([0, 50, 100])
    return out[0]


def dendrogram(tree: Tree, name: str) -> str:
    """A dendrogram with its cut: SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    group, out = tree.group, []
    first, lines, order = _layout(tree)
    made = tree.dendrogram.n - group.after  # merges below the cut
    heights = tree.dendrogram.heights.double().numpy()
    label = f"Dendrogram of {group.name}: {group.before} neurons, cut at {group.after} clusters"
    with _figure((9.0, 3.8), (0.08, 0.1, 0.85, 0.88), name, label, out) as axes:
        from matplotlib.collections import LineCollection

        width = min(1.2, max(0.5, 120 / len(order)))  # thin lines keep hundreds of leaves apart
        for kept, colour, alpha in ((False, _TEXT, 0.6), (True, _LINE, 1.0)):
            mine = [line for merge, line in enumerate(lines, first) if (merge < made) == kept]
            axes.add_collection(LineCollection(mine, colors=colour, linewidths=width, alpha=alpha))
        top = float(heights[-1]) if len(heights) else 1.0
        if made > 0:
            above = float(heights[made]) if made < len(heights) else 1.05 * top
            cut = (float(heights[made - 1]) + above) / 2
            axes.axhline(cut, color=_CUT, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"cut:\n{group.after:,} of\n{group.before:,}",
                (1, cut),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=_CUT,
            )
        axes.set(xlim=(-0.8, len(order) - 0.2), ylim=(0, 1.06 * (top or 1.0)), ylabel="height of the merge")
        axes.spines["bottom"].set_visible(False)
        numbered = len(order) == tree.dendrogram.n <= _NUMBERED
        axes.set_xticks(range(len(order)) if numbered else [], [str(leaf) for leaf in order] if numbered else [])
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("neuron" if numbered else f"{len(order):,} {'neurons' if not first else 'largest branches'}")
    return out[0]


def _layout(tree: Tree) -> tuple[int, list[np.ndarray], list[int]]:
    """The layout of a dendrogram.

    Returns:
        The number of the first merge that is drawn; the corners of the brackets of this and all later merges, float
        [4, 2] each; and the clusters at the bottom, from left to right.
    """
    n = tree.dendrogram.n
    merges = tree.dendrogram.merges.tolist()
    heights = tree.dendrogram.heights.double().tolist()
    first = max(0, n - _LEAVES)
    order, stack = [], [2 * n - 2]
    while stack:
        cluster = stack.pop()
        if cluster >= n + first:
            stack += reversed(merges[cluster - n])
        else:
            order.append(cluster)
    place: dict[int, tuple[float, float]] = {}
    for x, cluster in enumerate(order):
        place[cluster] = float(x), heights[cluster - n] if cluster >= n else 0.0
    lines = []
    for merge in range(first, n - 1):
        (left, low_left), (right, low_right) = (place[child] for child in merges[merge])
        high = heights[merge]
        lines.append(np.array([[left, low_left], [left, high], [right, high], [right, low_right]]))
        place[n + merge] = (left + right) / 2, high
    return first, lines, order


def png(picture: Any) -> str:
    """A filter as a data URL of a PNG, scaled to full contrast; grey is zero.

    Args:
        picture: [height, width, colours], 1 or 3 colours.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.image import imsave

    values = np.asarray(picture, dtype=float)
    shades = 0.5 + 0.5 * values / max(float(abs(values).max()), 1e-30)
    written = io.BytesIO()
    imsave(written, np.broadcast_to(shades, (*shades.shape[:2], 3)), format="png", pil_kwargs={"optimize": True})
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()

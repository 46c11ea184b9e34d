"""A picture of a compression: neurons of every layer before and after, and errors without and with fine-tuning."""

from collections.abc import Mapping
from pathlib import Path

_PALE, _BLUE, _ORANGE = "#c8d3e0", "#2f6da8", "#e0a458"
_ROW = 0.34  # height of a layer, inches


def draw_compression(
    before: Mapping[str, int],
    after: Mapping[str, int],
    errors: Mapping[str, tuple[float | None, float | None]],
    path: Path,
) -> None:
    """Draw it into a file. Bars lie, so that long names stand beside them and none covers another.

    Args:
        before: neurons by layer.
        after: neurons that are left.
        errors: of every network, in percent, not fine-tuned and fine-tuned; None where it was not measured.
        path: the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 1.4 + _ROW * max(len(before), 2 * len(errors))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), layout="constrained")
    places = range(len(before))
    whole = left.barh(places, list(before.values()), color=_PALE, label="before")
    left.barh(places, [after[name] for name in before], color=_BLUE, label="after")
    left.bar_label(whole, [f"{after[name]} of {count}" for name, count in before.items()], padding=3, fontsize=8)
    left.set(title="neurons of every layer", yticks=list(places), yticklabels=list(before))
    rows = range(len(errors))
    for number, (offset, colour, label) in enumerate(((-0.2, _ORANGE, "not fine-tuned"), (0.2, _BLUE, "fine-tuned"))):
        values = [pair[number] for pair in errors.values()]
        bars = right.barh([row + offset for row in rows], [v or 0.0 for v in values], 0.4, color=colour, label=label)
        right.bar_label(bars, ["" if v is None else f"{v:.2f}" for v in values], padding=3, fontsize=8)
    right.set(title="test error, %", yticks=list(rows), yticklabels=list(errors))
    for axis in (left, right):
        axis.invert_yaxis()  # the first one on top
        axis.margins(x=0.15)  # room for the numbers
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""Draws the figures of these pages from the tutorial's network: `python docs/figures.py`."""

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from scipy.cluster.hierarchy import dendrogram, set_link_color_palette

from nac_gpu.planning.prepare import plan_for
from nac_gpu.planning.request import Request
from nac_gpu.planning.taking import take

HERE = Path(__file__).parent
KEPT = 16


def tutorial() -> dict[str, Any]:
    """The names that the tutorial's first block of code defines: a trained `model`, `images`, and more."""
    first = re.findall(r"```python\n(.*?)```", (HERE / "tutorial.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    names: dict[str, Any] = {"__name__": "tutorial"}
    exec(first, names)
    return names


def main() -> None:
    """Draw the dendrogram of the first layer, and the error of each layer by the number of neurons kept."""
    names = tutorial()
    model, images = names["model"].eval(), names["images"]
    request = Request(width=0.5, calibration=list(images[:512].split(128)))
    prepared = plan_for(take(model, images[:1]), request)
    evidence = prepared.known(request)
    tree = evidence.tree(prepared.groups[0])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(3, 2))
    merges = tree.to_scipy()
    cut = float(merges[-KEPT, 2] + merges[-KEPT + 1, 2]) / 2
    set_link_color_palette(["#3f8fd2"])
    dendrogram(merges, ax=left, color_threshold=cut, above_threshold_color="#8a8a8a", no_labels=True)
    left.axhline(cut, color="#d9772b", linewidth=1.2)
    left.set(ylabel="height of the merger", xlabel="32 neurons")
    for group in prepared.groups:
        curve = evidence.curve(group)
        right.plot(
            [k / group.size for k in sorted(curve)], [curve[k] for k in sorted(curve)], label=f"layer {group.name}"
        )
    right.set(xlabel="share of the neurons kept", ylabel="share of the variance lost", ylim=(0, None))
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    (HERE / "figures").mkdir(exist_ok=True)
    figure.savefig(HERE / "figures" / "tree.png", dpi=110)


if __name__ == "__main__":
    main()

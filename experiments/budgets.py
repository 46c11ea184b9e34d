"""Whether budgets are met: 20 networks of torchvision, half of the parameters and half of the FLOPs.

    python experiments/budgets.py

Every network has random weights; widths are chosen by the weights alone, because which widths they are does not matter
here. "Obtained" is counted in the compressed network itself, after it was made.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
import tyro
from tqdm import tqdm

import nac_gpu as nac
from common.results import Results
from nac_gpu.reporting.text import table

MODELS = """alexnet vgg11 vgg16_bn vgg19_bn resnet18 resnet34 resnet50 resnext50_32x4d wide_resnet50_2 densenet121
densenet169 squeezenet1_1 mobilenet_v2 mobilenet_v3_large mnasnet1_0 efficientnet_b0 regnet_y_400mf regnet_x_800mf
convnext_tiny vit_b_16""".split()


@dataclass
class Options:
    """Ask for budgets, count what was obtained."""

    models: tuple[str, ...] = tuple(MODELS)
    """Of torchvision."""
    share: float = 0.5
    """What is asked for, of the parameters and then of the FLOPs."""
    size: int = 224
    """Height and width of the image."""
    results: Path = Path(__file__).parent / "results" / "budgets.json"
    """Measurements (JSON), kept after every network."""


def obtained(name: str, asked: str, options: Options) -> dict[str, float]:
    """The share that is left of what was asked for, and how far that is from it, in percent of it."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    image = torch.randn(1, 3, options.size, options.size)
    budget = {asked: options.share}
    small = nac.compress(model, image, **budget, calibration="none", rule="restored")  # pyright: ignore[reportArgumentType]
    costs = [nac.cost(network, image) for network in (model, small)]
    before, after = (cost.parameters if asked == "params" else cost.flops for cost in costs)
    share = after / before
    return {"share": share, "off": 100 * (share / options.share - 1)}


def main(options: Options) -> None:
    """Measure every network, print the table."""
    results = Results(options.results, {"share": options.share, "size": options.size}, torch.device("cpu"))
    lines = []
    for name in tqdm(options.models, unit="model", leave=False):
        cells: list[str] = []
        for asked in ("params", "flops"):
            row = results.measure(f"{name}, {asked}", 0, lambda name=name, asked=asked: obtained(name, asked, options))
            cells += [f"{100 * row['share']:.2f} %", f"{row['off']:+.2f} %"]
        lines.append([name, *cells])
    print(table(["model", "parameters left", "off by", "FLOPs left", "off by"], lines))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""The commands of `nac`."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import nn

import nac_gpu as nac
from nac_gpu.cli.inputs import Images, example_inputs, read_tensors
from nac_gpu.cli.options import Compressed, Training, Widths, calibrated
from nac_gpu.files.atomic import atomically, write_text
from nac_gpu.files.origin import origin_of
from nac_gpu.merging.refinement import PASSES
from nac_gpu.network.moving import to_device


@dataclass(kw_only=True)
class PlanCommand(Widths):
    """Say what a compression would do: groups of neurons, widths, cost, and what is left alone and why."""

    output: Path | None = None
    """Keep the plan in this JSON file; `nac compress --plan` takes it, with widths changed if you like."""

    def run(self) -> None:
        """Make it, print it."""
        source = self.source()
        model, inputs = self.original(source)
        plan = self.planned(model, inputs, calibrated(self, self.calibration, self.images, source, inputs))
        if self.output is not None:
            write_text(plan.to_json() + "\n", self.output)
        print(plan.to_json() if self.json else plan)


@dataclass(kw_only=True)
class Compress(Training, Widths):
    """Make the model smaller, fine-tune it if wanted, and keep it in a file.

    A run that was interrupted while fine-tuning goes on where it was: call it again in the same way.
    """

    output: Path
    """The file, .safetensors, which nac_gpu.load opens; a folder for models of transformers."""
    plan: Path | None = None
    """A plan that `nac plan --output` wrote, in place of --params, --flops, --latency and --width."""
    method: Literal["ward", "kmeans", "random", "l1"] = "ward"
    """How neurons are clustered."""
    rule: nac.Rule = "compensated"
    """How merged neurons and what reads them are chosen; "centroid" is the paper's rule."""
    neurons: nac.Neurons | None = None
    """How neurons are compared. Default: by activations, where they are compensated."""
    refine: int = PASSES
    """How often the smaller model looks at each calibration input to learn to answer as the original does; 0: never."""
    experts: int | float | None = None
    """Experts to keep in each mixture, a number or a share: similar ones become one, before anything else, so --params
    and --flops are of what is left then."""

    def run(self) -> None:
        """Compress, fine-tune, save, print."""
        if self.open and self.finetune is not None:
            raise ValueError("--finetune needs a model in memory, and --open leaves it in its files; use nac finetune")
        source = self.source()
        check_output(self.output)
        model, inputs = self.original(source)
        images = None
        if self.finetune is not None:
            images = Images(self.finetune, inputs, self.scale(source), self.batch_size, training=True)
        calibration = calibrated(self, self.calibration, self.images, source, inputs)
        small, plan = self.smaller(model, inputs, calibration)
        epochs: list[nac.Epoch] = []
        checkpoint = self.output.with_name(f"{self.output.name}.checkpoint")
        if images is not None:
            epochs = self.tune(small, model, images, checkpoint, self.seed)
        nac.save(small, self.output)
        checkpoint.unlink(missing_ok=True)
        found = {"output": str(self.output), "bytes": size_of(self.output), "plan": asdict(plan)}
        if self.json:
            print(json.dumps(found | {"epochs": [asdict(epoch) for epoch in epochs]}))
        else:
            print(f"written: {self.output} ({found['bytes']:,} bytes)")

    def smaller(
        self, model: nn.Module, inputs: nac.ExampleInputs, calibration: nac.Calibration
    ) -> tuple[nn.Module, nac.Plan]:
        """The smaller model, and what was done to it."""
        if self.experts is not None:
            model = nac.merge_experts(
                model, inputs, self.experts, calibration=calibration, refine=self.refine, seed=self.seed
            )
            origin = origin_of(model)
            assert origin is not None, "it was just made"
            if not self.json:
                print(origin.plan)
            if self.plan is None and not self.says_widths():
                return model, origin.plan
        plan = self.read_plan() if self.plan is not None else self.planned(model, inputs, calibration)
        if not self.json:
            print(plan)
        small = nac.compress(
            model,
            inputs,
            plan,
            calibration=calibration,
            method=self.method,
            rule=self.rule,
            neurons=self.neurons,
            refine=self.refine,
            seed=self.seed,
        )
        return small, plan

    def read_plan(self) -> nac.Plan:
        """The plan of --plan."""
        assert self.plan is not None, "asked by the caller"
        if self.says_widths():
            raise ValueError(
                "--plan comes in place of --params, --flops, --latency and --width, expected one or the other"
            )
        return nac.Plan.from_json(self.plan.read_text(encoding="utf-8"))


@dataclass(kw_only=True)
class Finetune(Training, Compressed):
    """Train a compressed model further, with the original as its teacher."""

    output: Path
    """Where the trained model goes, .safetensors."""

    def run(self) -> None:
        """Train, save, print."""
        if self.finetune is None:
            raise ValueError("give --finetune, a folder of images")
        check_output(self.output)
        source = self.source()
        model, inputs = self.original(source)
        small = self.small(source)
        images = Images(self.finetune, inputs, self.scale(source), self.batch_size, training=True)
        checkpoint = self.output.with_name(f"{self.output.name}.checkpoint")
        epochs = self.tune(small, model, images, checkpoint, self.seed)
        nac.save(small, self.output)
        checkpoint.unlink(missing_ok=True)
        found = {"output": str(self.output), "epochs": [asdict(epoch) for epoch in epochs]}
        print(json.dumps(found) if self.json else f"written: {self.output} (loss {epochs[-1].loss:.4f})")


@dataclass(kw_only=True)
class Export(Compressed):
    """Write a compressed model as an exported program (.pt2) or as ONNX, checked by running it."""

    output: Path
    """The file, .pt2 or .onnx."""
    fixed_batch: bool = False
    """The batch has the size of the example inputs, always."""

    def run(self) -> None:
        """Write, print."""
        source = self.source()
        inputs = to_device(example_inputs(self.inputs, source, source.build()), torch.device(self.device))
        error = nac.export(self.small(source), self.output, inputs, dynamic_batch=not self.fixed_batch)
        found = {"output": str(self.output), "bytes": size_of(self.output), "deviation": error}
        text = f"written: {self.output} ({found['bytes']:,} bytes; outputs deviate by {error:.1e})"
        print(json.dumps(found) if self.json else text)


@dataclass(kw_only=True)
class Linkage:
    """Ward clustering of points: labels, and the linkage matrix in SciPy's form."""

    points: tyro.conf.Positional[Path]
    """Points [n, d]: .npy, or the first tensor of a .safetensors file."""
    clusters: int | None = None
    """How many clusters."""
    height: float | None = None
    """In place of it: clusters below this height."""
    output: Path | None = None
    """Labels, int64 [n], .npy."""
    matrix: Path | None = None
    """The linkage matrix, float64 [n - 1, 4], .npy, as scipy.cluster.hierarchy.linkage gives it."""
    dtype: Literal["float64", "float32"] = "float64"
    """Of the distances; float32 halves the memory."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where it is computed."""
    json: bool = False
    """Print JSON, for scripts."""

    def run(self) -> None:
        """Cluster, write, print."""
        if (self.clusters is None) == (self.height is None) and not (self.clusters is None and self.matrix):
            raise ValueError("give --clusters or --height (or --matrix alone)")
        points = read_tensors(self.points)[0].to(self.device)
        tree = nac.ward_linkage(points, dtype=getattr(torch, self.dtype))
        found: dict[str, Any] = {"points": len(points), "dimensions": points.shape[1]}
        if self.matrix is not None:
            write_array(self.matrix, tree.to_scipy())
        if self.clusters is not None or self.height is not None:
            labels = tree.cut(self.clusters) if self.clusters is not None else tree.cut(height=self.height)
            counts = labels.bincount().sort(descending=True).values.tolist()
            found |= {"clusters": len(counts), "sizes": counts}
            if self.output is not None:
                write_array(self.output, labels.cpu().numpy())
        lines = [f"{name}: {value}" for name, value in found.items() if name != "sizes"]
        sizes = [str(size) for size in found.get("sizes", ())]
        if sizes:
            lines.append(f"sizes: {', '.join([*sizes[:12], *(['...'] if len(sizes) > 12 else [])])}")
        print(json.dumps(found) if self.json else "\n".join(lines))


@dataclass(kw_only=True)
class ReportCommand(Compressed):
    """Measure what a compression did: sizes, times, accuracy, widths; as a page (.html), text (.txt) or JSON."""

    output: Path
    """The file; its ending decides: .html, .txt or .json."""
    data: Path | None = None
    """A folder of images, <class>/<image>, to count right answers on."""
    layer: str | None = None
    """Whose dendrogram is drawn. Default: the first that was compressed."""
    calibration: str = "dream"
    """What the model was compressed with: a folder of images, a file of tensors, "dream" or "none"."""
    images: int = 512
    """How many images of the calibration folder are looked at."""
    batch_sizes: tuple[int, ...] = (1, 64)
    """Inputs in the passes that are timed."""
    seconds: float = 10.0
    """How long to time, in all."""

    def run(self) -> None:
        """Measure, write, print."""
        source = self.source()
        model, inputs = self.original(source)
        data = None
        if self.data is not None:
            data = Images(self.data, inputs, self.scale(source), max(self.batch_sizes))
        report = nac.report(
            model,
            self.small(source),
            inputs,
            calibration=calibrated(self, self.calibration, self.images, source, inputs),
            data=data,
            layer=self.layer,
            timed=dict.fromkeys(self.batch_sizes, self.seconds / len(self.batch_sizes)),
        )
        report = replace(report, title=f"{self.model}, compressed")
        report.save(self.output)
        print(report.to_json() if self.json else report.to_text())


def check_output(path: Path) -> None:
    """Hours of work should not end with a file that cannot be written.

    Raises:
        ValueError: the folder above it does not exist, or there is a folder of this name.
    """
    if path.suffix != ".safetensors" and path.exists():
        raise ValueError(f"--output {path} is there already; remove it or take another name")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.resolve().parent}")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return sum(file.stat().st_size for file in files)


def write_array(path: Path, values: "np.ndarray[Any, Any]") -> None:
    """An array as .npy."""
    with atomically(path) as partial, partial.open("wb") as file:
        np.save(file, values)


#: Commands by name.
COMMANDS: dict[str, Any] = {
    "plan": PlanCommand,
    "compress": Compress,
    "finetune": Finetune,
    "report": ReportCommand,
    "export": Export,
    "linkage": Linkage,
}

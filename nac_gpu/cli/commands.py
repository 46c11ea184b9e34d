"""The commands of `nac`."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

import nac_gpu as nac
from nac_gpu.cli.inputs import Images, example_inputs, read_tensors
from nac_gpu.cli.models import first_line
from nac_gpu.cli.options import Calibrated, Compressed, Training, Widths, note
from nac_gpu.cli.outputs import check_model_output, check_output, size_of, write_array
from nac_gpu.cli.texts import copy_tokenizer
from nac_gpu.files.atomic import write_text
from nac_gpu.files.folders import check_folder
from nac_gpu.files.origin import origin_of
from nac_gpu.merging.refinement import PASSES
from nac_gpu.network.moving import to_device


@dataclass(kw_only=True)
class PlanCommand(Widths):
    """Show what a compression would do: groups of neurons, widths, cost, and what is left alone and why."""

    output: Path | None = None
    """Write the plan to this JSON file for `nac compress --plan`; you may edit the widths."""

    def run(self) -> None:
        """Make and print the plan."""
        check_output(self.output)
        self.wanted()
        source = self.source()
        model, inputs = self.original(source)
        plan = self.planned(model, inputs, self.calibrated(source, inputs))
        if self.output is not None:
            write_text(plan.to_json() + "\n", self.output)
        print(plan.to_json() if self.json else self.shown(plan))


@dataclass(kw_only=True)
class Compress(Training, Widths):
    """Make the model smaller, optionally fine-tune it, and save it.

    To resume a run that was interrupted during fine-tuning, run the same command again.
    """

    output: Path
    """A file, .safetensors, for nac_gpu.load; or a folder, for models of transformers, with their tokenizer."""
    plan: Path | None = None
    """A plan that `nac plan --output` wrote, in place of --params, --flops, --latency and --width."""
    method: nac.Method = "auto"
    """How groups are made smaller: neurons are merged (ward), removed, both (mixed), or whatever loses least (auto)."""
    rule: nac.Rule = "compensated"
    """How merged neurons and their consumers are computed; "centroid" is the paper's rule."""
    neurons: nac.Neurons | None = None
    """How neurons are compared. Default: by activations with compensation, else by folded weights."""
    refine: int = PASSES
    """Passes over the calibration inputs in which the smaller model learns to reproduce the original; 0: none."""
    experts: int | float | None = None
    """Experts to keep in each mixture, a number or a share. Similar experts are merged first, so --params and --flops
    are relative to the model with fewer experts."""

    def run(self) -> None:
        """Compress, fine-tune, save, print."""
        if self.open and self.finetune is not None:
            raise ValueError("--finetune needs a model in memory, but --open keeps it in its files; use nac finetune")
        source = self.source()
        check_model_output(self.output)
        self.wanted()
        given = None if self.plan is None else self.read_plan(self.plan)
        model, inputs = self.original(source)
        images = None
        if self.finetune is not None:
            images = Images(self.finetune, inputs, self.scale(source), self.batch_size, training=True)
        calibration = self.calibrated(source, inputs)
        small, plan = self.smaller(model, inputs, calibration, given)
        epochs: list[nac.Epoch] = []
        checkpoint = self.output.with_name(f"{self.output.name}.checkpoint")
        if images is not None:
            epochs = self.tune(small, model, images, checkpoint, self.seed)
        nac.save(small, self.output)
        if self.output.is_dir() and Path(self.model).is_dir():
            try:
                copy_tokenizer(Path(self.model), self.output)
            except Exception as error:  # packages may be missing; the model is saved all the same
                note(f"the tokenizer of {self.model} was not copied: {first_line(error)}")
        checkpoint.unlink(missing_ok=True)
        found = {"output": str(self.output), "bytes": size_of(self.output), "plan": asdict(plan)}
        if self.json:
            print(json.dumps(found | {"epochs": [asdict(epoch) for epoch in epochs]}))
        else:
            print(f"written: {self.output} ({found['bytes']:,} bytes)")

    def smaller(
        self, model: nn.Module, inputs: nac.ExampleInputs, calibration: nac.Calibration, plan: nac.Plan | None
    ) -> tuple[nn.Module, nac.Plan]:
        """The smaller model and its plan, which may be given."""
        if self.experts is not None:
            model = nac.merge_experts(
                model, inputs, self.experts, calibration=calibration, refine=self.refine, seed=self.seed
            )
            origin = origin_of(model)
            assert origin is not None, "it was just made"
            if not self.json:
                print(self.shown(origin.plan))
            if plan is None and not self.says_widths():
                return model, origin.plan
        plan = plan or self.planned(model, inputs, calibration)
        if not self.json:
            print(self.shown(plan))
        if self.output.suffix != ".safetensors":
            check_folder(model, plan, self.output.name)
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

    def read_plan(self, path: Path) -> nac.Plan:
        """The plan in the file of --plan.

        Raises:
            ValueError: it is no plan, or widths are given, too.
            FileNotFoundError: there is no such file.
        """
        if self.says_widths():
            raise ValueError(
                "--plan comes in place of --params, --flops, --latency and --width, expected one or the other"
            )
        if not path.is_file():
            raise FileNotFoundError(f"--plan {path}: there is no such file")
        try:
            return nac.Plan.from_json(path.read_text(encoding="utf-8", errors="replace"))
        except ValueError as error:
            raise ValueError(f"--plan {path}: {error}") from error


@dataclass(kw_only=True)
class Finetune(Training, Compressed):
    """Train a compressed model further, with the original as its teacher."""

    output: Path
    """File for the trained model, .safetensors."""

    def run(self) -> None:
        """Train, save, print."""
        if self.finetune is None:
            raise ValueError("give --finetune, a folder of images")
        check_output(self.output, (".safetensors",))
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
    """Fix the batch size to that of the example inputs."""

    def run(self) -> None:
        """Write, print."""
        check_output(self.output, (".pt2", ".onnx"))
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
    """Number of clusters."""
    height: float | None = None
    """Cut the dendrogram at this height instead of --clusters."""
    output: Path | None = None
    """File for the labels, int64 [n], .npy."""
    matrix: Path | None = None
    """File for the linkage matrix, float64 [n - 1, 4], .npy, as of scipy.cluster.hierarchy.linkage."""
    dtype: Literal["float64", "float32"] = "float64"
    """Of the distances; float32 halves the memory."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of the computation."""
    json: bool = False
    """Print JSON, for scripts."""

    def run(self) -> None:
        """Cluster, write, print."""
        if (self.clusters is None) == (self.height is None) and not (self.clusters is None and self.matrix):
            raise ValueError("give --clusters or --height (or --matrix alone)")
        check_output(self.output, (".npy",))
        check_output(self.matrix, (".npy",), "--matrix")
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
class ReportCommand(Compressed, Calibrated):
    """Report on a compression: sizes, times, accuracy, widths; as a page (.html), text (.txt) or JSON."""

    output: Path
    """The file; its suffix defines the format: .html, .txt or .json."""
    data: Path | None = None
    """A folder of images, <class>/<image>, for measuring the accuracy."""
    layer: str | None = None
    """Draw the dendrogram of this layer. Default: the first that was compressed."""
    batch_sizes: tuple[int, ...] = (1, 64)
    """Batch sizes to time."""
    seconds: float = 10.0
    """Duration of timing, over all batch sizes."""

    def run(self) -> None:
        """Measure, write, print."""
        check_output(self.output, (".html", ".txt", ".md", ".json"))
        source = self.source()
        model, inputs = self.original(source)
        data = None
        if self.data is not None:
            data = Images(self.data, inputs, self.scale(source), max(self.batch_sizes))
        report = nac.report(
            model,
            self.small(source),
            inputs,
            calibration=self.calibrated(source, inputs),
            data=data,
            layer=self.layer,
            timed=dict.fromkeys(self.batch_sizes, self.seconds / len(self.batch_sizes)),
        )
        report = replace(report, title=f"{self.model}, compressed")
        report.save(self.output)
        print(report.to_json() if self.json else report.to_text())


#: Commands by name.
COMMANDS: dict[str, Any] = {
    "plan": PlanCommand,
    "compress": Compress,
    "finetune": Finetune,
    "report": ReportCommand,
    "export": Export,
    "linkage": Linkage,
}

"""Options shared by the commands of `nac`: the model, its new size, and training."""

import contextlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn

import nac_gpu as nac
from nac_gpu.cli.inputs import Images, calibration_images, example_inputs, image_of
from nac_gpu.cli.models import Scale, Source, find, load_weights
from nac_gpu.cli.texts import calibration_text, is_text
from nac_gpu.network.moving import to_device


def note(text: str) -> None:
    """Print a message to stderr, so that it does not mix with the output."""
    print(f"nac: {text}", file=sys.stderr)


@dataclass(kw_only=True)
class Model:
    """The model and its example inputs."""

    model: tyro.conf.Positional[str]
    """torchvision:NAME, timm:NAME, a folder of Hugging Face's transformers, an exported program (.pt2), or
    package.module:function, which is called without arguments."""
    weights: Path | None = None
    """Trained weights: a state dict (.safetensors, or from torch.save)."""
    pretrained: bool = False
    """Use the trained weights of torchvision or timm (downloads them)."""
    inputs: tuple[str, ...] = ()
    """Example inputs: for each argument a shape (1,3,224,224; integers as int:1,16) or a file of tensors, with the
    prefix name= for keyword arguments. Values hardly matter. Default: known for torchvision, timm and transformers."""
    mean: tuple[float, ...] = ()
    """Mean of each channel of images, for pixels in [0, 1]. Default: that of the source, else 0."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel of images, for pixels in [0, 1]. Default: that of the source, else 1."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of all computations."""
    seed: int = 0
    """Seed of all random numbers."""
    json: bool = False
    """Print JSON, for scripts."""

    def source(self) -> Source:
        """Where the model comes from.

        Raises:
            ValueError: no such model, or invalid --mean and --std.
        """
        if len(self.mean) != len(self.std):
            found = f"found {len(self.mean)} and {len(self.std)}"
            raise ValueError(f"--mean and --std belong together, one number for each channel; {found}")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or any(value <= 0 for value in self.std):
            found = f"--mean {' '.join(map(str, self.mean))} --std {' '.join(map(str, self.std))}"
            raise ValueError(f"expected finite --mean and --std above 0, found {found}")
        return find(self.model, self.pretrained)

    def scale(self, source: Source) -> Scale | None:
        """The normalisation of images."""
        return (self.mean, self.std) if self.mean else source.scale

    def original(self, source: Source) -> tuple[nn.Module, nac.ExampleInputs]:
        """The model in eval mode and its example inputs, on the device.

        Raises:
            ValueError: the number of values in --mean and --std does not match the channels of the images.
        """
        torch.manual_seed(self.seed)  # for random weights
        model = source.build()
        if self.weights is not None:
            load_weights(model, self.weights)
        elif not source.trained:
            note(f"{self.model} has random weights; give --weights" + (" or --pretrained" if ":" in self.model else ""))
        device = torch.device(self.device)
        inputs = to_device(example_inputs(self.inputs, source, model), device)
        _, image = image_of(inputs)
        if self.mean and image is not None and len(self.mean) not in (1, image.shape[1]):
            expected = f"expected 1 or one for each of {image.shape[1]} channels"
            raise ValueError(f"--mean and --std have {len(self.mean)} values each, {expected}")
        return model.to(device).eval(), inputs


@dataclass(kw_only=True)
class Calibrated(Model):
    """The inputs that neurons are compared on."""

    calibration: str = "dream"
    """Inputs for comparing neurons: a folder of images (<class>/<image>), a text file (for folders of transformers with
    a tokenizer), a file of tensors, "dream" for synthetic inputs, or "none" to use only the weights."""
    images: int = 512
    """Number of images drawn from the calibration folder."""
    tokens: int = 65536
    """Number of tokens used of the calibration text, from all parts of it."""
    length: int = 512
    """Tokens of a row of calibration text, at most what the model reads at once."""

    def calibrated(self, source: Source, inputs: nac.ExampleInputs) -> nac.Calibration:
        """The calibration inputs that --calibration describes."""
        if self.calibration == "dream" or self.calibration == "none":
            return self.calibration
        path = Path(self.calibration)
        if is_text(path):
            return calibration_text(path, source.reader, inputs, tokens=self.tokens, length=self.length, seed=self.seed)
        return calibration_images(path, inputs, self.scale(source), self.images, self.seed)


@dataclass(kw_only=True)
class Widths(Calibrated):
    """The new size of the model."""

    open: bool = False
    """For models larger than the memory: the weights stay in their safetensors files until they are needed. --weights
    is a file or a folder of them; a folder of transformers contains its own. Neurons are compared by their weights."""
    params: int | float | None = None
    """Budget for the parameters of the whole model: a share (0.25) or a number (2370000). Widths are chosen for the
    least loss."""
    flops: int | float | None = None
    """Budget for the FLOPs of a forward pass: a share or a number."""
    latency: float | None = None
    """Budget for the time of a forward pass on the example inputs, measured on --device: a share."""
    width: tuple[str, ...] = ()
    """Neurons to keep: a share for all layers (0.5), or layer=number and layer=share; names may be patterns."""
    multiple_of: int | None = None
    """Chosen widths are multiples of this. Default: 8 on CUDA and for --latency, else 1."""
    only: tuple[str, ...] | None = None
    """Compress only these layers, modules or patterns."""
    skip: tuple[str, ...] = ()
    """Do not compress these layers, modules or patterns."""
    verbose: bool = False
    """Print a line for every layer, also where many differ only in the numbers of their blocks."""

    def original(self, source: Source) -> tuple[nn.Module, nac.ExampleInputs]:
        """The model in eval mode, with weights in their files if --open is given, and its inputs, on the device."""
        if not self.open:
            return super().original(source)
        weights = self.weights or (Path(self.model) if Path(self.model).is_dir() else None)
        if weights is None or source.untrained is None:
            raise ValueError(
                f"--open {self.model}: expected --weights with safetensors files, and no --pretrained or .pt2"
            )
        model = nac.open_model(source.untrained, weights, device=self.device)
        return model, to_device(example_inputs(self.inputs, source, model), torch.device(self.device))

    def wanted(self) -> nac.Width | None:
        """The widths in --width.

        Raises:
            ValueError: something else than numbers and shares.
        """
        if not self.width:
            return None
        if len(self.width) == 1 and "=" not in self.width[0]:
            return float(_number(self.width[0]))
        pairs = [text.rpartition("=") for text in self.width]
        if not all(layer for layer, _, _ in pairs):
            raise ValueError("--width: expected one share, or layer=number or layer=share for each layer")
        return {layer: _number(value) for layer, _, value in pairs}

    def says_widths(self) -> bool:
        """Whether widths or a budget are given."""
        return any(value is not None for value in (self.params, self.flops, self.latency)) or bool(self.width)

    def shown(self, plan: nac.Plan) -> str:
        """The plan as it is printed."""
        return plan.detailed() if self.verbose else str(plan)

    def planned(self, model: nn.Module, inputs: nac.ExampleInputs, calibration: nac.Calibration) -> nac.Plan:
        """The plan."""
        return nac.plan(
            model,
            inputs,
            width=self.wanted(),
            params=self.params,
            flops=self.flops,
            latency=self.latency,
            calibration=calibration,
            multiple_of=self.multiple_of,
            only=self.only,
            skip=self.skip,
            seed=self.seed,
        )


def _number(text: str) -> int | float:
    """A number of neurons (int) or a share (float) in --width."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    raise ValueError(f"--width: {text!r} is no number, expected one share (0.5), layer=number or layer=share")


@dataclass(kw_only=True)
class Training:
    """How a model is fine-tuned."""

    finetune: Path | None = None
    """Fine-tune on this folder of images, <class>/<image>, classes in the order of their names."""
    epochs: int = 10
    """Passes over the images."""
    learning_rate: float = 0.01
    """Maximum of the learning rate."""
    weight_decay: float = 5e-4
    """Weight decay; not applied to biases and normalisations."""
    batch_size: int = 128
    """Images of a step."""
    distillation: float = 0.5
    """The share of distillation from the original in the loss."""

    def tune(
        self, model: nn.Module, teacher: nn.Module, images: Images, checkpoint: Path, seed: int
    ) -> list[nac.Epoch]:
        """Train in place, with checkpoints."""
        return nac.finetune(
            model,
            images,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            teacher=teacher if self.distillation else None,
            distillation=self.distillation,
            checkpoint=checkpoint,
            callbacks=[lambda _, epoch: note(f"epoch {epoch.number}/{self.epochs}: loss {epoch.loss:.4f}")],
            progress=sys.stderr.isatty(),
            seed=seed,
        )


@dataclass(kw_only=True)
class Compressed(Model):
    """A compressed model: its file, and the original."""

    file: tyro.conf.Positional[Path]
    """A file or folder that `nac compress` or nac_gpu.save wrote."""

    def small(self, source: Source) -> nn.Module:
        """The compressed model, on the device."""
        if self.file.is_dir():
            return find(str(self.file)).build().to(self.device).eval()
        return nac.load(self.file, source.build, device=self.device)

"""What the commands of `nac` have in common: a model, how small it is to become, how it is trained."""

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
from nac_gpu.network.moving import to_device


def note(text: str) -> None:
    """A line for people, beside what is printed."""
    print(f"nac: {text}", file=sys.stderr)


@dataclass(kw_only=True)
class Model:
    """The model, and what it is called with."""

    model: tyro.conf.Positional[str]
    """torchvision:NAME, timm:NAME, a folder of Hugging Face's transformers, an exported program (.pt2), or
    package.module:function, which is called without arguments."""
    weights: Path | None = None
    """Trained weights: a state dict (.safetensors, or of torch.save)."""
    pretrained: bool = False
    """Take the trained weights that torchvision or timm offer (downloads them)."""
    inputs: tuple[str, ...] = ()
    """Example inputs: a shape (1,3,224,224; whole numbers as int:1,16) or a file of tensors for each argument, with
    name= before it for keyword arguments. Values hardly matter. Default: what the source says."""
    mean: tuple[float, ...] = ()
    """What is taken out of each channel of images, pixels in 0 to 1. Default: what the source says, else 0."""
    std: tuple[float, ...] = ()
    """By what each channel of images is divided then. Default: what the source says, else 1."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where everything is computed."""
    seed: int = 0
    """Of everything drawn."""
    json: bool = False
    """Print JSON, for scripts."""

    def source(self) -> Source:
        """Where the model comes from.

        Raises:
            ValueError: no such model, or no images can be normalised by --mean and --std.
        """
        if len(self.mean) != len(self.std):
            found = f"found {len(self.mean)} and {len(self.std)}"
            raise ValueError(f"--mean and --std belong together, one number for each channel; {found}")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or any(value <= 0 for value in self.std):
            found = f"--mean {' '.join(map(str, self.mean))} --std {' '.join(map(str, self.std))}"
            raise ValueError(f"expected finite --mean and --std above 0, found {found}")
        return find(self.model, self.pretrained)

    def scale(self, source: Source) -> Scale | None:
        """How images are normalised."""
        return (self.mean, self.std) if self.mean else source.scale

    def original(self, source: Source) -> tuple[nn.Module, nac.ExampleInputs]:
        """The model in eval mode, and its inputs, on the device.

        Raises:
            ValueError: --mean and --std have other numbers of values than the images have channels.
        """
        torch.manual_seed(self.seed)  # of weights, where there are none
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
class Widths(Model):
    """How small the model is to become."""

    open: bool = False
    """For models larger than the memory: the weights stay in their safetensors files until they are needed. --weights
    names a file or a folder of them; a folder of transformers has its own. Neurons are compared by their weights."""
    params: int | float | None = None
    """Parameters of the whole model after: a share (0.25) or a number (2370000). Widths are chosen to lose least."""
    flops: int | float | None = None
    """Operations of a forward pass after: a share or a number."""
    latency: float | None = None
    """Time of a forward pass on the example inputs after, where it is computed now: a share. It is measured."""
    width: tuple[str, ...] = ()
    """Neurons to keep: a share for all layers (0.5), or layer=neurons and layer=share; names may be patterns."""
    multiple_of: int | None = None
    """Chosen widths are multiples of this. Default: 8 on CUDA and for --latency, else 1."""
    only: tuple[str, ...] | None = None
    """Compress only these layers, modules or patterns."""
    skip: tuple[str, ...] = ()
    """Do not compress these layers, modules or patterns."""
    calibration: str = "dream"
    """What neurons are judged by: a folder of images (<class>/<image>) or a file of tensors; "dream": inputs made up;
    "none": the weights alone."""
    images: int = 512
    """How many images of the calibration folder are looked at."""

    def original(self, source: Source) -> tuple[nn.Module, nac.ExampleInputs]:
        """The model in eval mode, its weights in their files if that was asked for, and its inputs, on the device."""
        if not self.open:
            return super().original(source)
        weights = self.weights or (Path(self.model) if Path(self.model).is_dir() else None)
        if weights is None or source.untrained is None:
            raise ValueError(
                f"--open {self.model}: expected --weights, safetensors files, and no other trained weights"
            )
        model = nac.open_model(source.untrained, weights, device=self.device)
        return model, to_device(example_inputs(self.inputs, source, model), torch.device(self.device))

    def wanted(self) -> nac.Width | None:
        """What --width says."""
        if not self.width:
            return None
        if len(self.width) == 1 and "=" not in self.width[0]:
            return float(self.width[0])
        pairs = [text.rpartition("=") for text in self.width]
        if not all(layer for layer, _, _ in pairs):
            raise ValueError("--width: expected one share, or layer=neurons for each layer")
        return {layer: float(value) if "." in value else int(value) for layer, _, value in pairs}

    def says_widths(self) -> bool:
        """Whether anything here says how small."""
        return any(value is not None for value in (self.params, self.flops, self.latency)) or bool(self.width)

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


@dataclass(kw_only=True)
class Training:
    """How a model is fine-tuned."""

    finetune: Path | None = None
    """Fine-tune on this folder of images, <class>/<image>, classes in the order of their names."""
    epochs: int = 10
    """Passes over the images."""
    learning_rate: float = 0.01
    """The largest."""
    weight_decay: float = 5e-4
    """Of weights."""
    batch_size: int = 128
    """Images of a step."""
    distillation: float = 0.5
    """The share of the loss that asks for the original's answers."""

    def tune(
        self, model: nn.Module, teacher: nn.Module, images: Images, checkpoint: Path, seed: int
    ) -> list[nac.Epoch]:
        """Train in place; the checkpoint is gone when all is done."""
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
    """A compressed model: the file, and the original that it was made from."""

    file: tyro.conf.Positional[Path]
    """What `nac compress` or nac_gpu.save wrote."""

    def small(self, source: Source) -> nn.Module:
        """The compressed model, on the device."""
        if self.file.is_dir():
            return find(str(self.file)).build().to(self.device).eval()
        return nac.load(self.file, source.build, device=self.device)


def calibrated(
    options: Model, calibration: str, images: int, source: Source, inputs: nac.ExampleInputs
) -> nac.Calibration:
    """What --calibration says."""
    if calibration == "dream" or calibration == "none":
        return calibration
    return calibration_images(Path(calibration), inputs, options.scale(source), images, options.seed)

"""The models of the zoo, by suite: built from their configurations, with random weights; nothing is downloaded."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.architectures import ARCHITECTURES

#: Image sizes other than 64: what the model's code or tensors ask for.
SIDES = {"vit": 224, "maxvit": 224, "inception_v3": 299, "alexnet": 96, "squeezenet": 96, "convnext": 96, "swin": 96}

TIMM = """
resnet18 resnetv2_50 regnety_004 efficientnet_b0 mobilenetv3_small_100 densenet121 convnext_atto
convnextv2_atto vit_tiny_patch16_224 deit_tiny_patch16_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224
mixer_s32_224 resmlp_12_224 gmlp_s16_224 cait_xxs24_224 eva02_tiny_patch14_224 pit_ti_224 coat_tiny levit_128s
mobilevit_xxs poolformer_s12 edgenext_xx_small efficientformer_l1 ghostnet_050 hrnet_w18_small dla34
eca_nfnet_l0 repvgg_a0 xcit_nano_12_p16_224
"""


@dataclass(frozen=True)
class Case:
    """A model of the zoo.

    Attributes:
        build: makes the model.
        inputs: makes its example inputs.
        afterwards: what the compressed model must be able to do besides its forward pass, or None.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    afterwards: Callable[[nn.Module], Any] | None = None


def images(side: int, batch: int = 2, channels: int = 3) -> Tensor:
    """Random images."""
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


def torchvision_models() -> dict[str, Case]:
    """All classification models."""
    from torchvision import models

    def case(name: str) -> Case:
        side = next((size for start, size in SIDES.items() if name.startswith(start)), 64)
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return Case(lambda: models.get_model(name, weights=None, **options), lambda: images(side))

    return {name: case(name) for name in models.list_models(module=models)}


def segmentation_models() -> dict[str, Case]:
    """All of torchvision's segmentation models."""
    from torchvision import models

    def build(name: str) -> nn.Module:
        return models.get_model(name, weights=None, weights_backbone=None)

    names = models.list_models(module=models.segmentation)
    return {name: Case(partial(build, name), lambda: images(64)) for name in names}


def detection_models() -> dict[str, Case]:
    """Backbones of torchvision's detectors, and heads that run on feature maps of one size."""
    from torchvision.models import detection

    def backbone(name: str, **options: Any) -> nn.Module:
        return getattr(detection, name)(weights=None, weights_backbone=None, **options).backbone

    def keypoint_head() -> nn.Module:
        heads = detection.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None).roi_heads
        return nn.Sequential(heads.keypoint_head, heads.keypoint_predictor)  # pyright: ignore[reportArgumentType]

    sides = {
        "fasterrcnn_resnet50_fpn": 64,
        "retinanet_resnet50_fpn": 64,
        "keypointrcnn_resnet50_fpn": 64,
        "ssd300_vgg16": 300,
        "ssdlite320_mobilenet_v3_large": 320,
    }
    found = {
        f"{name}.backbone": Case(partial(backbone, name), partial(images, side, 2 if side != 300 else 1))
        for name, side in sides.items()
    }
    return found | {"keypointrcnn_resnet50_fpn.heads": Case(keypoint_head, lambda: images(14, 2, 256))}


def timm_models() -> dict[str, Case]:
    """Small models of thirty families."""

    def build(name: str) -> nn.Module:
        import timm  # pyright: ignore[reportMissingImports] -- optional

        return timm.create_model(name, pretrained=False)

    def inputs(name: str) -> Tensor:
        import timm  # pyright: ignore[reportMissingImports] -- optional

        configuration = timm.get_pretrained_cfg(name)
        assert configuration is not None, name
        return images(configuration.input_size[-1] if configuration.fixed_input_size else 64)

    return {name: Case(partial(build, name), partial(inputs, name)) for name in TIMM.split()}


SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

#: Name -> class of the configuration, class of the model, what the configuration is given.
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", SMALL),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL | {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SMALL | {"num_key_value_heads": 2}),
    "mixtral": (  # its grouped product has no float64, in which identity is measured
        "MixtralConfig",
        "MixtralForCausalLM",
        SMALL | {"num_key_value_heads": 2, "num_local_experts": 4, "experts_implementation": "eager"},
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", VISION | {"intermediate_size": 48}),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8}
        | {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
        | {f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")}
        | {"max_source_positions": 12, "max_target_positions": 40},
    ),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {
            "text_config": SMALL | {"max_position_embeddings": 16, "projection_dim": 24},
            "vision_config": VISION | {"intermediate_size": 48, "projection_dim": 24},
            "projection_dim": 24,
        },
    ),
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
GENERATING = ("gpt2", "llama", "qwen2", "mixtral", "t5", "whisper")


def transformers_models() -> dict[str, Case]:
    """Tiny models of the transformers library, with attention written out and by PyTorch's function."""

    def build(name: str, attention: str) -> nn.Module:
        transformers: Any = importlib.import_module("transformers")
        configuration, model, options = TRANSFORMERS[name]
        special = SPECIAL if name in GENERATING else {}
        made = getattr(transformers, configuration)(**options, **special, attn_implementation=attention)
        return getattr(transformers, model)(made)

    def inputs(name: str) -> dict[str, Any]:
        tokens = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))
        if name in ("vit", "swin"):
            return {"pixel_values": images(32)}
        if name == "clip":
            return {"input_ids": tokens, "pixel_values": images(32)}
        if name == "bert":
            return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if name == "t5":
            return {"input_ids": tokens, "decoder_input_ids": tokens[:, :5], "use_cache": False}
        if name == "whisper":
            return {"input_features": images(24)[:, 0, :8], "decoder_input_ids": tokens[:, :5], "use_cache": False}
        return {"input_ids": tokens, "use_cache": False}

    def generate(name: str, model: nn.Module) -> None:
        given = {key: value for key, value in inputs(name).items() if key in ("input_ids", "input_features")}
        generator: Any = model
        generator.eval().generate(**given, max_new_tokens=4, do_sample=False)

    return {
        f"{name}-{attention}": Case(
            partial(build, name, attention),
            partial(inputs, name),
            partial(generate, name) if name in GENERATING else None,
        )
        for name in TRANSFORMERS
        for attention in ("eager", "sdpa")
    }


def handwritten_models() -> dict[str, Case]:
    """Small networks of many kinds."""
    return {name: Case(entry.build, entry.inputs) for name, entry in ARCHITECTURES.items()}


#: Suite -> the package that it needs, and its models.
SUITES: Mapping[str, tuple[str, Callable[[], dict[str, Case]]]] = {
    "torchvision": ("torchvision", torchvision_models),
    "segmentation": ("torchvision", segmentation_models),
    "detection": ("torchvision", detection_models),
    "timm": ("timm", timm_models),
    "transformers": ("transformers", transformers_models),
    "handwritten": ("nac_gpu", handwritten_models),
}


def installed(suite: str) -> bool:
    """Whether the package of a suite is here."""
    return importlib.util.find_spec(SUITES[suite][0]) is not None


def case(name: str) -> Case:
    """The model of a name `suite/model`.

    Raises:
        ValueError: there is no such suite or model.
    """
    suite, _, model = name.partition("/")
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}, expected one of {', '.join(SUITES)}")
    cases = SUITES[suite][1]()
    if model not in cases:
        raise ValueError(f"unknown model {model!r}, expected one of {', '.join(cases)}")
    return cases[model]

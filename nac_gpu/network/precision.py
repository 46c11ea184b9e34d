"""The precision of products and sums: TF32, bfloat16, float32, float64."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Products and convolutions of float32 on CUDA in full precision; the user's settings are restored afterwards.

    TF32 keeps three digits and is on for convolutions by default, but the outputs compared here must agree to five.
    """
    before = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch 2.9 warns about the older settings
        for owner, name, precise in (*_OLDER_TF32, *_NEWER_TF32):
            # Reading an older setting fails if the user has set a newer one, and PyTorch 2.8 lacks the newer ones.
            with contextlib.suppress(RuntimeError, AttributeError):
                before.append((owner, name, getattr(owner, name), precise))
        for owner, name, _, precise in before:
            setattr(owner, name, precise)
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for owner, name, value, _ in before:
                setattr(owner, name, value)


class _Products:
    """The older setting for matrix products as an attribute, so that all settings are read and set the same way."""

    @property
    def precision(self) -> str:
        return torch.get_float32_matmul_precision()

    @precision.setter
    def precision(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)


# Owner, name, and the value without TF32.
_OLDER_TF32 = ((torch.backends.cudnn, "allow_tf32", False), (_Products(), "precision", "highest"))
_NEWER_TF32 = tuple(  # since PyTorch 2.9
    (owner, "fp32_precision", "ieee")
    for owner in (
        getattr(torch.backends.cudnn, "conv", None),
        getattr(torch.backends.cudnn, "rnn", None),
        torch.backends.cuda.matmul,
    )
)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16: a GPU since Ampere, or a CPU with AMX or AVX-512 BF16 instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and supported


def floating(tensor: Tensor) -> Tensor:
    """The tensor in the dtype used for products: float64 stays float64, everything else becomes float32."""
    return tensor.to(working_dtype(tensor))


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype used for sums over this tensor: float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def in_dtype(value: Any, dtype: torch.dtype | None) -> Any:
    """Floating tensors in another dtype, complex ones in the complex dtype of the same precision, others unchanged.

    With None for the dtype, everything is unchanged.
    """
    if dtype is None or not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.to(dtype.to_complex() if value.is_complex() else dtype)

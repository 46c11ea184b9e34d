"""A stand-in for CUDA tensors on a machine without a GPU: their device is cuda:0, their values are the host's.

Inside `standin()` tensors are made on `cuda:0`, moved there and back, and computed with, in the host's arithmetic. What
a GPU would refuse is refused (operands on two devices, a generator of the host), and each time that the host would wait
for a GPU is counted, with the line of the library that made it wait.

PyTorch must not take these tensors for those of its own CUDA, whose streams it would look for. To its C++ they are on
`standin:0`, a device of the kind that others may add, known until the process ends; to Python they are on `cuda:0`.
"""

import contextlib
import copy
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing

import nac_gpu
from nac_gpu import kernels

#: Whether `standin` can be used: there is no GPU, and PyTorch takes devices that are written in Python.
AVAILABLE = not torch.cuda.is_available() and hasattr(backend_registration, "_DummyDeviceGuard")
CUDA = torch.device("cuda", 0)
_NAME = "standin"  # what PyTorch's C++ calls the device
_FOLDERS = tuple(f"{Path(str(module.__file__)).parent}/" for module in (nac_gpu, kernels))

#: Operations that make the host wait: the size of their result, or whether they failed, depends on values.
_WAITING = frozenset(
    "_local_scalar_dense nonzero masked_select _unique _unique2 unique_dim unique_consecutive equal bincount histc "
    "_linalg_check_errors _linalg_eigh _linalg_svd linalg_eig linalg_lstsq".split()
)
_INDEXING = frozenset("index index_put index_put_ _index_put_impl_ _unsafe_index _unsafe_index_put".split())
_FILLING = frozenset("masked_fill masked_fill_ index_fill index_fill_".split())  # they read the number on the host
_ACROSS = frozenset("copy_ _to_copy _pack_padded_sequence tensor_split".split())  # written for two devices
#: What makes new tensors; the rest is made of these, and of operations in place.
_FACTORIES = (
    "empty.memory_format empty_strided arange arange.start arange.start_step eye eye.m linspace logspace range "
    "randperm randperm.generator tril_indices triu_indices"
).split()


@dataclass(frozen=True)
class Event:
    """One time that host and device met."""

    kind: str  # "wait" for a value, or a copy "to host" or "to device"
    op: str
    place: str  # where the library asked for it: file, line and function
    calls: tuple[str, ...]  # the library's functions that were running, the innermost first
    size: int  # bytes copied
    waits: bool  # the host stands still until the device has got there


@dataclass
class Counts:
    """All that happened between host and device so far."""

    events: list[Event] = field(default_factory=list)

    def select(self, kind: str | None = None, *, within: str | None = None, waits: bool | None = None) -> list[Event]:
        """Events of a kind (or of all), while a function of the library ran, that do or do not wait (or both)."""
        return [
            event
            for event in self.events
            if kind in (None, event.kind) and waits in (None, event.waits) and (not within or within in event.calls)
        ]

    @property
    def waits(self) -> int:
        """How often the host waited for the device: for values, and for copies in either direction."""
        return len(self.select(waits=True))

    def by_place(self, top: int | None = None, *, within: str | None = None, waits: bool | None = True) -> str:
        """A table for people: how often, what, how many bytes in all, and at which line of the library."""
        found: dict[tuple[str, str, str], list[int]] = {}
        for event in self.select(within=within, waits=waits):
            found.setdefault((event.place, event.kind, event.op), []).append(event.size)
        rows = sorted(found.items(), key=lambda item: -len(item[1]))[:top]
        return "\n".join(f"{len(n):6} {kind:9} {op:24} {sum(n):10} bytes  {place}" for (place, kind, op), n in rows)


_counts: Counts | None = None  # of the stand-in that is in use
_pinned: dict[int, torch.UntypedStorage] = {}  # memory by its id, kept while the stand-in is in use


def _note(kind: str, op: str, size: int = 0, *, waits: bool = True) -> None:
    """Count an event, at the innermost line of the library that is running."""
    if _counts is None:
        return
    place, calls = "outside", []
    frame = sys._getframe(1)
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if str(path).startswith(_FOLDERS):
            place = place if calls else f"{path.parent.name}/{path.name}:{frame.f_lineno} {name}"
            calls.append(name)
        frame = frame.f_back
    _counts.events.append(Event(kind, op, place, tuple(calls), size, waits))


def _pin(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    _pinned[storage._cdata] = storage
    return tensor


def _is_pinned(tensor: Tensor, *_: Any) -> bool:
    return not isinstance(tensor, OnDevice) and tensor.untyped_storage()._cdata in _pinned


class OnDevice(Tensor):
    """A tensor on the stand-in's device."""

    inner: Tensor  # its values, on the host and without gradients
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, inner: Tensor) -> "OnDevice":
        """A tensor of the device with these values, in this memory."""
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, **layout, dtype=inner.dtype, device=f"{_NAME}:0")
        made.inner = inner
        return made

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, OnDevice):
            raise RuntimeError(f"data of a tensor on {CUDA} is set to a tensor on {value.device}")
        Tensor.data.__set__(self, value)
        self.inner = value.inner

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __setitem__(self, index: Any, value: Any) -> None:  # numbers come from the host
        number = isinstance(value, bool | int | float)
        super().__setitem__(index, torch.tensor(value, dtype=self.dtype) if number else value)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnDevice({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = made = on_device(self)
        made.grad = copy.deepcopy(self.grad, memo)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(issubclass(kind, OnDevice) or kind in (Tensor, nn.Parameter) for kind in types):
            return NotImplemented
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        _check(func, name, args, pytree.tree_leaves((args, kwargs)))
        _count(name, args, kwargs)
        given = kwargs.get("device")
        if given is not None and given.type in ("cuda", _NAME):
            kwargs, given = kwargs | {"device": torch.device("cpu")}, None
        own_args, own_kwargs = pytree.tree_map_only(OnDevice, lambda tensor: tensor.inner, (args, kwargs))
        out = _ONLY_ON_CUDA.get(name, func)(*own_args, **own_kwargs)
        if name == "copy_" and not isinstance(args[0], OnDevice):
            return args[0]
        if given is not None:  # on the host, in pinned memory if nobody waits, or without values
            pinned = given.type == "cpu" and kwargs.get("non_blocking")
            return pytree.tree_map_only(Tensor, _pin, out) if pinned else out
        if func._schema.is_mutable and torch.Tag.inplace_view not in func.tags:
            for tensor in pytree.tree_leaves((args, kwargs)):
                if isinstance(tensor, OnDevice) and tensor.shape != tensor.inner.shape:  # out= was given another size
                    Tensor.data.__set__(tensor, OnDevice.of(tensor.inner))
        return return_and_correct_aliasing(func, args, kwargs, pytree.tree_map_only(Tensor, OnDevice.of, out))


def _check(func: Any, name: str, args: Any, leaves: list[Any]) -> None:
    """Refuse what a GPU refuses: operands on two devices, and a generator of the host."""
    if any(isinstance(value, torch.Generator) for value in leaves):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    indexing = name in _INDEXING and isinstance(args[0], OnDevice)  # indices may be on the host
    operands = pytree.tree_leaves(args[2:]) if indexing else leaves
    strangers = [value for value in operands if isinstance(value, Tensor) and not isinstance(value, OnDevice)]
    if not strangers or name in _ACROSS:
        return
    # Operations in place lack the tag that those with a result have.
    packet = getattr(torch.ops.aten, name.removesuffix("_"), func.overloadpacket)
    tags = [*func.tags, *getattr(packet, func._overloadname, func).tags]
    if indexing or name in _FILLING or name.startswith(("fill", "_foreach_")) or torch.Tag.pointwise in tags:
        strangers = [value for value in strangers if value.ndim]  # numbers of the host may be tensors
    if strangers:
        shapes = ", ".join(f"{tuple(value.shape)} on {value.device}" for value in leaves if isinstance(value, Tensor))
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} was given {shapes}")


def _count(name: str, args: Any, kwargs: Any) -> None:
    """Count what an operation copies, and whether the host waits for it."""
    if name == "copy_":
        target, source = args[:2]
        later = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if not isinstance(source, OnDevice):
            _note("to device", name, source.nbytes, waits=not (later and _is_pinned(source)))
        elif not isinstance(target, OnDevice):
            _note("to host", name, source.nbytes, waits=not (later and _is_pinned(target)))
    elif name == "_to_copy":
        if kwargs.get("device") is not None and kwargs["device"].type == "cpu":
            _note("to host", name, args[0].nbytes, waits=not kwargs.get("non_blocking"))
    elif name in _INDEXING:
        indices, value = [index for index in args[1] if index is not None], args[2] if len(args) > 2 else None
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        if len(masks) == len(indices) == 1 and value is not None and value.numel() == 1 and not any(args[3:4]):
            name, indices, masks = "masked_fill_", [], [value]  # it takes that way, and reads the number
        for index in indices:
            if not isinstance(index, OnDevice):
                _note("to device", name, index.nbytes)
        for mask in masks:  # becomes numbers of places, of which the host must know how many
            if isinstance(mask, OnDevice):
                _note("wait", name)
    else:
        reads = name in _FILLING and isinstance(args[-1], OnDevice)
        counts = name == "repeat_interleave" and kwargs.get("output_size") is None
        if reads or counts or name in _WAITING or kwargs.get("check_errors"):
            _note("wait", name)


def _lstm_cell(inputs: Any, hidden: Any, cell: Any, *biases: Any) -> Any:
    gates = sum(own if bias is None else own + bias for own, bias in zip_longest((inputs, hidden), biases))
    i, f, g, o = gates.chunk(4, 1)
    new = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * new.tanh(), new, gates


def _lstm_cell_backward(hidden: Any, cell: Any, before: Any, after: Any, gates: Any, has_bias: bool) -> Any:
    backward, nothing = torch.ops.aten._thnn_differentiable_lstm_cell_backward, torch.zeros_like(gates)
    found = backward(hidden, cell, gates, nothing, None, None, before, after)
    return found[0], found[2], found[0].sum(0) if has_bias else torch.empty(0)


def _gru_cell(inputs: Any, hidden: Any, state: Any, *biases: Any) -> Any:
    own, read = (own if bias is None else own + bias for own, bias in zip_longest((inputs, hidden), biases))
    (ir, iz, i), (hr, hz, h) = own.chunk(3, 1), read.chunk(3, 1)
    new = (i + (ir + hr).sigmoid() * h).tanh()
    return new + (iz + hz).sigmoid() * (state - new), torch.cat((own, read, state), 1)


def _gru_cell_backward(slope: Any, kept: Any, has_bias: bool) -> Any:
    own, read, state = kept.split([3 * slope.shape[1], 3 * slope.shape[1], slope.shape[1]], 1)
    found = torch.ops.aten._thnn_differentiable_gru_cell_backward(slope, own, read, state, None, None)[:3]
    return *found, *((gates.sum(0) if has_bias else torch.empty(0)) for gates in found[:2])


#: Cells of recurrent layers, one operation on a GPU only; their last result is what the backward pass is given.
_ONLY_ON_CUDA: dict[str, Callable[..., Any]] = {
    "_thnn_fused_lstm_cell": _lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": _lstm_cell_backward,
    "_thnn_fused_gru_cell": _gru_cell,
    "_thnn_fused_gru_cell_backward": _gru_cell_backward,
}


def on_device(tensor: Tensor) -> Tensor:
    """A copy on the stand-in's device, which is not counted; a parameter stays one."""
    made = OnDevice.of(to_host(tensor))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, which is not counted; without gradients."""
    return (tensor.inner if isinstance(tensor, OnDevice) else tensor.detach()).clone()


def model_on_device(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters and buffers are on the stand-in's device; what is tied stays so."""
    return copy.deepcopy(model, {id(value): on_device(value) for value in [*model.parameters(), *model.buffers()]})


@cache  # once, and for as long as the process runs
def _register() -> torch.library.Library:
    """Tell PyTorch of the device, and let what is made on CUDA be made there."""
    module = backend_registration._DummyBackendModule()
    module.is_available, module.device_count = lambda: _counts is not None, lambda: int(_counts is not None)
    module.get_rng_state, module.set_rng_state = lambda _: torch.zeros(16, dtype=torch.uint8), lambda *_: None
    backend_registration._setup_privateuseone_for_python_backend(_NAME, module)
    library = torch.library.Library("aten", "IMPL")

    def factory(function: Any) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            if _counts is None:
                raise RuntimeError("No CUDA GPUs are available: the stand-in is not in use")
            if kwargs.get("generator") is not None:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            return OnDevice.of(function(*args, **kwargs | {"device": torch.device("cpu"), "pin_memory": False}))

        return make

    def copied(source: Tensor, target: OnDevice, non_blocking: bool = False) -> Tensor:  # a list that is an index
        _count("copy_", (target, source, non_blocking), {})
        return OnDevice.of(target.inner.copy_(source))

    library.impl("_copy_from", copied, "PrivateUse1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kernels of CUDA's are replaced
        for name in _FACTORIES:
            packet, _, overload = name.partition(".")
            make = factory(getattr(getattr(torch.ops.aten, packet), overload or "default"))
            for key in ("CUDA", "PrivateUse1"):
                library.impl(name, make, key, allow_override=True)
    _device_constructors()  # remembers torch.empty, which `standin` replaces for a while
    return library


def _moving(to: Any) -> Callable[..., Tensor]:
    """`Tensor.to` that knows which of the two devices is meant by CUDA."""

    def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        there = torch.device(_NAME, 0) if isinstance(tensor, OnDevice) else CUDA
        args, kwargs = pytree.tree_map_only(
            (str, torch.device), lambda given: there if torch.device(given).type == "cuda" else given, (args, kwargs)
        )
        return to(tensor, *args, **kwargs)

    return moved


def _making(make: Any) -> Callable[..., Tensor]:
    """What makes a tensor: in pinned memory where that is asked for; from values in Python, on the host at first."""
    copies = make in (torch.tensor, torch.as_tensor)

    def made(*args: Any, pin_memory: bool = False, device: Any = None, **kwargs: Any) -> Tensor:
        if copies and device is not None and torch.device(device).type == "cuda":
            tensor = make(*args, **kwargs).to(device)
            return tensor.detach().requires_grad_() if kwargs.get("requires_grad") else tensor
        tensor = make(*args, device=device, **kwargs)
        return _pin(tensor) if pin_memory else tensor

    return made


@contextlib.contextmanager
def standin() -> Iterator[Counts]:
    """Within the context there is a device `cuda:0`, if it is `AVAILABLE`; what host and device exchange is counted."""
    if not AVAILABLE:
        raise RuntimeError("the stand-in is for machines without a GPU, and for a PyTorch with devices in Python")
    _register()
    answers: dict[str, Any] = {
        **dict.fromkeys(("current_device", "memory_allocated", "memory_reserved"), 0),
        **dict.fromkeys(("_lazy_init", "set_rng_state")),
        "device": contextlib.nullcontext(),
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_device_name": "stand-in",
        "get_device_properties": types.SimpleNamespace(total_memory=8 * 2**30),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "is_bf16_supported": False,
        "mem_get_info": (8 * 2**30, 8 * 2**30),
    }
    event = types.SimpleNamespace(record=lambda *_: None, synchronize=lambda: _note("wait", "Event.synchronize"))
    counts = Counts()
    others = (
        (sys.modules[__name__], "_counts", counts),
        (torch.cuda, "Event", lambda **_: event),
        (torch.cuda, "synchronize", lambda *_: _note("wait", "torch.cuda.synchronize")),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (Tensor, "pin_memory", lambda tensor, *_: _pin(tensor.clone())),
        (Tensor, "is_pinned", _is_pinned),
        (Tensor, "to", _moving(Tensor.to)),
        (Tensor, "cuda", lambda tensor, *_, **kwargs: tensor.to(CUDA, **kwargs)),
        *((torch, name, _making(getattr(torch, name))) for name in "empty zeros ones full tensor as_tensor".split()),
    )
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, _answer=answer, **__: _answer))
        for owner, name, new in others:
            stack.enter_context(mock.patch.object(owner, name, new))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # its threads are not on our stack
        stack.enter_context(kernels.use_backend("torch"))
        stack.callback(_pinned.clear)
        yield counts

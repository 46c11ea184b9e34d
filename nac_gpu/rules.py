"""What each ATen operation does to channels: the rules of the record.

A rule reads the labels of its inputs, notes equations, roles and freezes in the atoms, and returns the labels of the
outputs. Movement of data is applied to the planes as it is, so reshapes, concatenations and shuffles of any kind need
no rule of their own. An operation without a rule freezes what enters it: never a wrong network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nac_gpu.labels import MEAN, NONE, SUM, Atoms, Labels, compact, varying

MOVEMENT = frozenset(
    """view _unsafe_view reshape _reshape_alias permute transpose t squeeze unsqueeze expand slice select narrow split
    split_with_sizes chunk unbind flip roll repeat repeat_interleave index index_select constant_pad_nd unfold
    movedim swapaxes tile unsafe_split unsafe_chunk pixel_shuffle pixel_unshuffle channel_shuffle reflection_pad1d
    reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d""".split()
)
PERMUTATION = frozenset("permute transpose t unsqueeze movedim swapaxes".split())  # need no expanded plane
IDENTITY = frozenset("alias detach clone contiguous _to_copy lift_fresh lift_fresh_copy dropout alpha_dropout".split())
ELEMENTWISE = frozenset("hardswish _prelu_kernel prelu rrelu celu masked_fill threshold".split())  # lack the tag
REDUCTIONS = frozenset(
    "sum mean amax amin max min var std var_mean std_mean logsumexp prod linalg_vector_norm norm".split()
)
ALONG_DIM = frozenset("_softmax _log_softmax softmax log_softmax cumsum cumprod sort topk".split())
SPATIAL = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample", "fractional_max_pool")
BATCH_NORM = frozenset(
    """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
    miopen_batch_norm _batch_norm_with_update batch_norm_with_update _batch_norm_no_update batch_norm""".split()
)
PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "mv": 0, "addmv": 1, "matmul": 0}  # where the factors start
VALUE_FREE = frozenset(
    """zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full
    new_empty_strided sym_size sym_numel sym_stride is_same_size""".split()
)


@dataclass(frozen=True)
class Production:
    """One use of a parameter that makes channels: a matrix product, a convolution, an embedding.

    Attributes:
        atoms: int64 [channels], the atoms of the weight that name the channels.
        bias: int64 [channels] atoms of the bias added in the same operation, or None.
    """

    atoms: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Normalisation:
    """One BatchNorm in eval mode.

    Attributes:
        channels: int64 [channels] atoms that it normalises.
        tensors: names of weight, bias, running mean and running variance (None where there is none).
        eps: added to the variance.
        source: number of the production whose bare result it normalises, or None.
    """

    channels: Tensor
    tensors: tuple[str | None, str | None, str | None, str | None]
    eps: float
    source: int | None


class Rules:
    """The rules, and what they note down.

    Args:
        atoms: filled by the rules.
        name_of: the name of a parameter or buffer of the model, None for other tensors.
        labels_of: the labels of a tensor that an operation reads.
        module: the name of the module that is running.
    """

    def __init__(
        self,
        atoms: Atoms,
        name_of: Callable[[Tensor], str | None],
        labels_of: Callable[[Tensor], Labels],
        module: Callable[[], str],
    ) -> None:
        self.atoms = atoms
        self.productions: list[Production] = []
        self.normalisations: list[Normalisation] = []
        self.uses: dict[int, int] = {}  # of a production's bare result, by anything but movement
        self._name_of = name_of
        self._labels_of = labels_of
        self._module = module

    def apply(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> list[Labels]:
        """The labels of the outputs (one for each tensor in `out`, in order)."""
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        outputs = [value for value in pytree.tree_leaves(out) if isinstance(value, Tensor)]
        labelled = [value for value in tensors if self._labels_of(value).planes]
        nothing = [Labels()] * len(outputs)
        name = func.overloadpacket.__name__
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        if not labelled or name in VALUE_FREE:
            return nothing
        moved = name in MOVEMENT or name in IDENTITY or name in ("cat", "stack")
        if not moved:
            for source in {self._labels_of(value).source for value in labelled}:
                if source is not None:
                    self.uses[source] = self.uses.get(source, 0) + 1
        rule = self._rule(name, func)
        if rule is None:
            self.freeze(labelled, f"operation {name} is not known")
            return nothing
        try:
            return rule(args, kwargs, outputs, func)
        except Exception as error:  # a rule that meets what it was not written for must not break the user's model
            self.freeze(labelled, f"operation {name} was used in a way that is not known ({error})")
            return nothing

    def _rule(self, name: str, func: torch._ops.OpOverload) -> Callable[..., list[Labels]] | None:
        if name in IDENTITY:
            return lambda args, kwargs, outputs, func: [self._labels_of(args[0])]
        if name in MOVEMENT:
            return self._movement
        if name in ("cat", "stack"):
            return self._join
        if name in REDUCTIONS:
            return self._reduction
        if name in ALONG_DIM:
            return self._along_dim
        if name in BATCH_NORM:
            return self._batch_norm
        if any(name.lstrip("_").startswith(prefix) for prefix in SPATIAL):
            return self._spatial
        if name in PRODUCTS:
            return lambda args, kwargs, outputs, func: self._product(args, kwargs, outputs, PRODUCTS[name])
        special = {"convolution": self._convolution, "embedding": self._embedding, "copy": self._copy}
        if name in special:
            return special[name]
        if name in ELEMENTWISE or torch.Tag.pointwise in func.tags or _functional_is_pointwise(func):
            return self._elementwise
        return None

    def freeze(self, tensors: Sequence[Tensor], reason: str) -> None:
        """Freeze every label of these tensors, with the running module's name in the reason."""
        for tensor in tensors:
            for plane in self._labels_of(tensor).planes:
                self._freeze_plane(plane, reason)

    def _freeze_plane(self, plane: Tensor, reason: str) -> None:
        self.atoms.freeze(plane, f"{reason} in {self._module()}")

    def along(self, tensor: Tensor, dim: int) -> Tensor | None:
        """The atoms along one dimension, int64 [size]; None if unlabelled, or if they differ elsewhere too (frozen)."""
        dim %= tensor.ndim
        for plane in self._labels_of(tensor).planes:
            dims = varying(plane)
            single = not dims and tensor.shape[dim] == 1 and self._home(plane, tensor) == dim
            if dims == (dim,) or single:
                return plane.flatten()
            if dim in dims:
                self._freeze_plane(plane, "channels are laid out in a way that is not known")
        return None

    def _home(self, plane: Tensor, tensor: Tensor) -> int:
        """Where a plane of a single atom belongs: a parameter's own dimension, else the channel dimension 1."""
        if self._labels_of(tensor).parameter:
            atom = int(plane.flatten()[0])
            return next(s.dim for s in self.atoms.slots if s.first <= atom < s.first + s.size)
        return min(1, tensor.ndim - 1)

    # -- data movement ------------------------------------------------------------------------------------------------

    def _movement(self, args: Any, kwargs: Any, outputs: list[Tensor], func: Any) -> list[Labels]:
        tensor, rest = args[0], args[1:]
        labels = self._labels_of(tensor)
        if func.overloadpacket.__name__ == "constant_pad_nd":
            rest = (rest[0], NONE)  # padding has no label
        per_output: list[list[Tensor]] = [[] for _ in outputs]
        for plane in labels.planes:
            name = func.overloadpacket.__name__
            full = plane if name in PERMUTATION else plane.expand(tensor.shape).contiguous()
            moved = [v for v in pytree.tree_leaves(func(full, *rest, **kwargs)) if isinstance(v, Tensor)]
            for target, result in zip(per_output, moved, strict=True):
                small = compact(result)
                if small is None:
                    continue
                if len(varying(small)) > max(1, len(varying(plane))):
                    self._freeze_plane(plane, "channels are regrouped")
                    continue
                target.append(small)
        return [Labels(tuple(planes), labels.parameter, labels.source) for planes in per_output]

    def _join(self, args: Any, kwargs: Any, outputs: list[Tensor], func: Any) -> list[Labels]:
        tensors = [t for t in args[0] if t.ndim == outputs[0].ndim or func.overloadpacket.__name__ == "stack"]
        if any(len(self._labels_of(t).planes) > 1 for t in tensors):
            self.freeze(tensors, "tensors with several labelled dimensions are joined")
            return [Labels()]
        full = [
            self._labels_of(t).planes[0].expand(t.shape)
            if self._labels_of(t).planes
            else torch.full((1,) * t.ndim, NONE).expand(t.shape)
            for t in tensors
        ]
        plane = compact(func(full, *args[1:], **kwargs))
        assert plane is not None, "at least one operand is labelled"
        if len(varying(plane)) > 1:
            self._freeze_plane(plane, "differently labelled tensors are joined along another dimension")
            return [Labels()]
        return [Labels((plane,), all(self._labels_of(t).parameter for t in tensors))]

    def _copy(self, args: Any, kwargs: Any, outputs: list[Tensor], func: Any) -> list[Labels]:
        """Writing into an existing tensor, which may be a view of a larger one that goes on without these labels."""
        self.freeze(args[:2], "values are written in place")
        return [Labels()]

    # -- arithmetic ---------------------------------------------------------------------------------------------------

    def _elementwise(self, args: Any, kwargs: Any, outputs: list[Tensor], func: Any) -> list[Labels]:
        operands = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        ndim = outputs[0].ndim
        planes: dict[tuple[int, ...], Tensor] = {}
        for tensor in operands:
            for plane in self._labels_of(tensor).planes:
                aligned = plane.reshape((1,) * (ndim - plane.ndim) + plane.shape)
                dims = varying(aligned)
                for other in list(planes):
                    if other != dims and set(other) & set(dims):
                        self._freeze_plane(aligned, "differently laid out channels meet")
                        self._freeze_plane(planes.pop(other), "differently laid out channels meet")
                        break
                else:
                    planes[dims] = self._meet(planes[dims], aligned) if dims in planes else aligned
                if self._labels_of(tensor).parameter:
                    self.atoms.role(plane[plane >= 0], MEAN)
        for dims, plane in planes.items():
            for tensor in operands:
                self._check_context(tensor, dims, plane, ndim)
        written_in_place = func._schema.is_mutable and args[0]._is_view() and not self._labels_of(args[0]).planes
        if written_in_place:
            self.freeze(operands, "values are written in place")
            return [Labels()]
        return [Labels(tuple(planes.values()), all(self._labels_of(t).parameter for t in operands))] * len(outputs)

    def _meet(self, left: Tensor, right: Tensor) -> Tensor:
        """One plane for two operands of an elementwise operation; channels that meet are united."""
        left, right = torch.broadcast_tensors(left, right)
        both = (left >= 0) & (right >= 0)
        self.atoms.unite(left[both], right[both])
        for plane in (left, right):  # a label that meets none is combined with something that differs by channel
            self._freeze_plane(plane[~both], "channels meet values that are not channels")
        return torch.where(left >= 0, left, right)

    def _check_context(self, tensor: Tensor, dims: tuple[int, ...], plane: Tensor, ndim: int) -> None:
        """An unlabelled operand that differs along labelled channels keeps them from being merged."""
        if tensor.ndim == 0:
            return
        offset = ndim - tensor.ndim
        labelled = {dim + offset for p in self._labels_of(tensor).planes for dim in varying(p)}
        for dim in dims:
            own = dim - offset
            if dim in labelled or own < 0 or tensor.shape[own] == 1:
                continue
            if not bool((tensor == tensor.narrow(own, 0, 1)).all()):
                self._freeze_plane(plane, "channels meet values that differ between them and are not channels")

    def _product(self, args: Any, kwargs: Any, outputs: list[Tensor], first: int) -> list[Labels]:
        """Matrix products: `a @ b`, or `bias + a @ b`."""
        a, b = args[first], args[first + 1]
        contracted_b = b.ndim - 2 if b.ndim > 1 else 0
        if any(set(varying(p)) & set(range(t.ndim - 2)) for t in (a, b) for p in self._labels_of(t).planes):
            self.freeze([a, b], "channels are spread over a batch of matrix products")
            return [Labels()]
        in_a, in_b = self.along(a, -1), self.along(b, contracted_b)
        self._contract(a, in_a, b, in_b)
        out = outputs[0]
        planes: list[Tensor] = []
        source = None
        bias = args[0] if first else None
        for tensor, own, dim in ((a, a.ndim - 2, out.ndim - 2), (b, b.ndim - 1, out.ndim - 1)):
            if own < 0 or (tensor is b and b.ndim == 1):
                continue
            atoms = self.along(tensor, own)
            if atoms is None:
                continue
            if self._labels_of(tensor).parameter:
                source = self._produce(atoms, bias if tensor is b else None)
            elif atoms.min() == atoms.max() and tensor.shape[own] > 1:
                continue
            planes.append(_plane(atoms, dim, out.ndim))
        if bias is not None:
            self._add_bias(bias, out, planes)
        return [Labels(tuple(planes), source=source)]

    def _add_bias(self, bias: Tensor, out: Tensor, planes: list[Tensor]) -> None:
        for bias_plane in self._labels_of(bias).planes:
            aligned = bias_plane.reshape((1,) * (out.ndim - bias_plane.ndim) + bias_plane.shape)
            match = [p for p in planes if varying(p) == varying(aligned)]
            if not match:
                self._freeze_plane(aligned, "a bias is added to values that are not channels")
            for plane in match:
                self._meet(plane, aligned)
            self.atoms.role(bias_plane[bias_plane >= 0], MEAN)

    def _contract(self, a: Tensor, in_a: Tensor | None, b: Tensor, in_b: Tensor | None) -> None:
        """Sum over a dimension that two tensors share: a consumer where one of them is a parameter."""
        for weight, columns, value, channels in ((b, in_b, a, in_a), (a, in_a, b, in_b)):
            if columns is not None and self._labels_of(weight).parameter and not self._labels_of(value).parameter:
                self.atoms.role(columns[columns >= 0], SUM)
                if channels is None:
                    self._freeze_plane(columns, "reads values that are not channels")
                    return
                known = (channels >= 0) & (columns >= 0)
                self.atoms.unite(channels[known], columns[known])
                self._freeze_plane(columns[~known], "reads values that are not channels")
                self._freeze_plane(channels[~known], "read by values that are not a parameter")
                return
        for atoms in (in_a, in_b):
            if atoms is not None:
                self._freeze_plane(atoms, "multiplied by values that are not a parameter")

    def _produce(self, atoms: Tensor, bias: Tensor | None) -> int:
        self.atoms.role(atoms[atoms >= 0], MEAN)
        bias_atoms = self.along(bias, -1) if bias is not None and self._labels_of(bias).parameter else None
        self.productions.append(Production(atoms, bias_atoms))
        return len(self.productions) - 1

    def _convolution(self, args: Any, kwargs: Any, outputs: list[Tensor], func: Any) -> list[Labels]:
        images, weight, bias = args[:3]
        transposed, groups = args[6], args[8]
        out = outputs[0]
        rows, columns = (1, 0) if transposed else (0, 1)
        if not self._labels_of(weight).parameter:
            self.freeze([images, weight], "a convolution's kernel is not a parameter")
            return [Labels()]
        channels = self.along(images, 1)
        made = self.along(weight, rows)
        assert made is not None, "a parameter's dimensions are labelled"
        if groups == 1:
            self._contract(images, channels, weight, self.along(weight, columns))
        elif weight.shape[1] == 1 and weight.shape[0] == groups and channels is not None and not transposed:
            self._per_channel(made, channels)  # depthwise: a kernel for each channel
        else:
            self.freeze([images, weight], "grouped convolutions are not known yet")
            return [Labels()]
        planes = [_plane(made, 1, out.ndim)]
        source = self._produce(made, bias)
        if bias is not None:
            atoms = self.along(bias, 0)
            assert atoms is not None, "a parameter's dimensions are labelled"
            self._per_channel(atoms, made)
        return [Labels(tuple(planes), source=source)]

    def _per_channel(self, atoms: Tensor, channels: Tensor) -> None:
        """A parameter with one value (or kernel) for each channel."""
        self.atoms.role(atoms, MEAN)
        known = channels >= 0
        self.atoms.unite(atoms[known], channels[known])
        self._freeze_plane(atoms[~known], "acts on values that are not channels")

    def _embedding(self, args: Any, kwargs: Any, outputs: list[Tensor], func: Any) -> list[Labels]:
        weight, out = args[0], outputs[0]
        for plane in self._labels_of(weight).planes:
            if varying(plane) == (0,):
                self._freeze_plane(plane, "rows are looked up by index")
        atoms = self.along(weight, 1)
        if atoms is None or not self._labels_of(weight).parameter:
            self.freeze([weight], "rows are looked up in values that are not a parameter")
            return [Labels()]
        return [Labels((_plane(atoms, out.ndim - 1, out.ndim),), source=self._produce(atoms, None))]

    def _batch_norm(self, args: Any, kwargs: Any, outputs: list[Tensor], func: Any) -> list[Labels]:
        images, tensors = args[0], args[1:5]
        labels = self._labels_of(images)
        eps = next(value for value in reversed(args) if isinstance(value, float))
        channels = self.along(images, 1)
        names: list[str | None] = []
        for tensor in tensors:
            if tensor is None:
                names.append(None)
                continue
            name = self._name_of(tensor)
            if name is None:
                self.freeze([images], "a normalisation's parameters are computed")
                self.freeze([t for t in tensors if t is not None], "a normalisation's parameters are computed")
                return [Labels()] * len(outputs)
            names.append(name)
            atoms = self.atoms.of(name, 0, tensor.shape[0])
            if channels is None:
                self._freeze_plane(atoms, "normalises values that are not channels")
            else:
                self._per_channel(atoms, channels)
        if channels is None:
            self.freeze([images], "normalised over a dimension that is not channels")
            return [Labels()] * len(outputs)
        weight, bias, mean, variance = names
        self.normalisations.append(Normalisation(channels, (weight, bias, mean, variance), eps, labels.source))
        return [Labels(labels.planes)] + [Labels()] * (len(outputs) - 1)

    # -- sums and windows over dimensions -----------------------------------------------------------------------------

    def _reduction(self, args: Any, kwargs: Any, outputs: list[Tensor], func: Any) -> list[Labels]:
        schema = [argument.name for argument in func._schema.arguments]
        given = dict(zip(schema, args, strict=False)) | kwargs
        tensor, dims = args[0], given.get("dim")
        if "other" in given:  # torch.max(a, b)
            return self._elementwise(args, kwargs, outputs, func)
        if dims is None or dims == []:
            dims = range(tensor.ndim)
        reduced = {dim % tensor.ndim for dim in (dims if isinstance(dims, Sequence | range) else [dims])}
        keep = bool(given.get("keepdim", False))
        planes = []
        for plane in self._labels_of(tensor).planes:
            if reduced & set(varying(plane)) or not varying(plane):
                self._freeze_plane(plane, f"{func.overloadpacket.__name__} is taken over channels")
                continue
            shape = [1 if d in reduced else s for d, s in enumerate(plane.shape) if keep or d not in reduced]
            planes.append(plane.reshape(shape))
        return [Labels(tuple(planes))] * len(outputs)

    def _along_dim(self, args: Any, kwargs: Any, outputs: list[Tensor], func: Any) -> list[Labels]:
        schema = [argument.name for argument in func._schema.arguments]
        given = dict(zip(schema, args, strict=False)) | kwargs
        dim = given.get("dim", -1) % args[0].ndim
        planes = []
        for plane in self._labels_of(args[0]).planes:
            if dim in varying(plane) or not varying(plane):
                self._freeze_plane(plane, f"{func.overloadpacket.__name__.strip('_')} is taken over channels")
            else:
                planes.append(plane)
        return [Labels(tuple(planes))] * len(outputs)

    def _spatial(self, args: Any, kwargs: Any, outputs: list[Tensor], func: Any) -> list[Labels]:
        """Pooling and resampling: windows over the last one, two or three dimensions."""
        name = func.overloadpacket.__name__
        windows = next(size for size in (1, 2, 3) if f"{size}d" in name)
        planes = []
        for plane in self._labels_of(args[0]).planes:
            if any(dim >= plane.ndim - windows for dim in varying(plane)):
                self._freeze_plane(plane, f"{name.strip('_')} is taken over channels")
            else:
                planes.append(plane)
        return [Labels(tuple(planes))] * len(outputs)


def _plane(atoms: Tensor, dim: int, ndim: int) -> Tensor:
    """Atoms [size] as a plane that varies along one dimension."""
    shape = [1] * ndim
    shape[dim] = len(atoms)
    return atoms.reshape(shape)


def _functional_is_pointwise(func: torch._ops.OpOverload) -> bool:
    """In-place operations lack the pointwise tag: look at the operation without the trailing underscore."""
    name = func.overloadpacket.__name__
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    overload = getattr(packet, func._overloadname, None) if packet is not None else None
    return overload is not None and torch.Tag.pointwise in overload.tags

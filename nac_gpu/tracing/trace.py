"""Records one forward pass of a model to find which channels belong together, and which must be left alone.

The pass runs on example inputs, in eval mode and without gradients, under a `TorchDispatchMode` that intercepts every
ATen operation, however the model is written. `nac_gpu.tracing.rules` defines what each operation does to channels;
`nac_gpu.tracing.grouping` derives groups from the resulting equations.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from nac_gpu.network.copying import copied
from nac_gpu.network.costs import flop_counter
from nac_gpu.network.reaching import tensors_in
from nac_gpu.network.running import ExampleInputs, call, describe, evaluating, in_small_operations
from nac_gpu.network.state import tensors
from nac_gpu.tracing.atoms import Atoms, Labels
from nac_gpu.tracing.calls import Call
from nac_gpu.tracing.cells import CELLS
from nac_gpu.tracing.graph import Graph, LeftAlone
from nac_gpu.tracing.grouping import find_groups
from nac_gpu.tracing.recorder import Notes
from nac_gpu.tracing.rules.dispatch import apply
from nac_gpu.tracing.shapes_only import Outline
from nac_gpu.tracing.steps import FewSteps

_NOTHING = Labels()


class _Labelled:
    """The labels of all tensors of a pass that still exist."""

    def __init__(self, model: nn.Module, atoms: Atoms) -> None:
        self.names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self._own = {id(tensor) for tensor in model.parameters()}
        statistics = ("running_mean", "running_var")  # have one value per channel, like weights
        self._own |= {id(tensor) for name, tensor in model.named_buffers() if name.endswith(statistics)}
        self._atoms = atoms
        self._known = WeakTensorKeyDictionary()
        # What the rule of the current operation has asked for. It asks often, and the dictionary above is slow.
        self._asked: dict[int, tuple[Tensor, Labels]] = {}

    def forget_asked(self) -> None:
        """Begin with another operation."""
        self._asked.clear()

    def of(self, tensor: Tensor) -> Labels:
        """The labels of a tensor; those of parameters and buffers are created on first use."""
        asked = self._asked.get(id(tensor))
        if asked is not None:
            return asked[1]
        found = self._known.get(tensor)
        if found is None and id(tensor) in self.names:
            found = self._known[tensor] = self._first(tensor, self.names[id(tensor)])
        self._asked[id(tensor)] = tensor, found or _NOTHING  # with the tensor, so that its id is not used again
        return found or _NOTHING

    def _first(self, tensor: Tensor, name: str) -> Labels:
        """The labels of a parameter or buffer before anything is written into it."""
        own = id(tensor) in self._own
        if not own and not tensor.is_floating_point():
            return Labels()
        planes = []
        for dim, size in enumerate(tensor.shape):
            shape = [1] * tensor.ndim
            shape[dim] = size
            planes.append(self._atoms.of(name, dim, size, parameter=own).reshape(shape))
            if tensor.is_complex():
                self._atoms.freeze(planes[-1], f"{name} is complex")
        return Labels(tuple(planes), parameter=True) if own else Labels(latent=tuple(planes))

    def put(self, tensor: Tensor, labels: Labels) -> None:
        """Store the labels of a tensor that an operation returned or wrote into."""
        told = labels.planes or labels.uniform or labels.pending or labels.latent or labels.repeats is not None
        if told or tensor in self._known:
            self._known[tensor] = labels
            self._asked.pop(id(tensor), None)


class _Record(TorchDispatchMode):
    """Propagates labels from the inputs of every operation of the pass to its outputs."""

    def __init__(self, model: nn.Module, run: Callable[[Any, Any, Any], Any], original: nn.Module) -> None:
        super().__init__()
        self._run = run  # runs an operation, with or without values
        self._foreign = {_storage(tensor): name for name, tensor in tensors(original).items() if tensor.numel()}
        self.flops = 0
        self.operations: dict[str, int] = {}  # FLOPs by the name of the parameter that they multiply with
        self.modules: list[str] = [type(model).__name__]  # running modules, the innermost last
        self.values = False  # whether all values are computed
        self.written: dict[str, None] = {}  # names of parameters that the pass writes to, in order
        self._storages = {_storage(tensor): name for name, tensor in model.named_parameters() if tensor.numel()}
        self._sizes = {name: len(tensor) for name, tensor in model.named_parameters() if tensor.ndim > 1}
        atoms, modules = Atoms(), self.modules
        self.labelled = labelled = _Labelled(model, atoms)
        self.notes = Notes(  # no closure refers to self: a reference cycle would delay freeing the memory of the pass
            atoms,
            name_of=lambda tensor: labelled.names.get(id(tensor)),
            labels_of=labelled.of,
            put=labelled.put,
            module=lambda: modules[-1],
        )

    def unread(self) -> dict[str, int]:
        """Weights that no operation has read, and how many neurons each makes."""
        seen = {slot.tensor for slot in self.notes.atoms.slots}
        return {name: size for name, size in self._sizes.items() if name not in seen}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CELLS:
            with self:
                return CELLS[func](*args, **kwargs)
        if func._schema.is_mutable:
            self._note_writes(func, args, kwargs)
        out = self._run(func, args, kwargs)
        with _disable_current_modes():
            outputs = [value for value in pytree.tree_leaves(out) if isinstance(value, Tensor)]
            labels = apply(self.notes, Call(func, args, kwargs, outputs))
            for tensor, found in zip(outputs, labels, strict=True):
                self.labelled.put(tensor, found)
            self._count(func, args, kwargs, out)
            self.labelled.forget_asked()
        return out

    def _note_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note the parameters that an operation is about to write to, perhaps through a view or through `data`.

        Raises:
            OriginalWrittenError: it would write to the user's model.
        """
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                for tensor in pytree.tree_leaves(given):
                    storage = _storage(tensor) if isinstance(tensor, Tensor) else None
                    if storage in self._storages:
                        self.written[self._storages[storage]] = None
                    elif storage in self._foreign:
                        raise OriginalWrittenError(
                            f"{self.modules[-1]} would write to {self._foreign[storage]} of the model itself, not of "
                            "the copy that runs: it finds the model through an object that copy.deepcopy leaves as it "
                            "is; expected a model that uses its own modules and tensors: make the object copy them"
                        )

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Add the FLOPs of an operation to the parameter that it multiplies with, if any."""
        counted = flop_registry.get(func._overloadpacket)
        if counted is None:
            return
        for value in args:
            # biases have one dimension and are skipped
            labels = self.labelled.of(value) if isinstance(value, Tensor) and value.ndim > 1 else Labels()
            if not labels.parameter or not labels.planes:
                continue
            name = self.notes.atoms.slot_at(int(labels.planes[0].max())).tensor
            self.operations[name] = self.operations.get(name, 0) + counted(*args, **kwargs, out_val=out)
            return


class OriginalWrittenError(RuntimeError):
    """The code of a copied model would write to the user's model."""


def _storage(tensor: Tensor) -> int:
    """A number that tensors have in common if they share memory."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


class _Shapes(TorchDispatchMode):
    """Runs operations for their shapes only."""

    def __init__(self, outline: Outline) -> None:
        super().__init__()
        self._outline = outline

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._outline(func, args, kwargs or {})


def runs(model: nn.Module, example_inputs: ExampleInputs) -> bool:
    """Whether a model runs on inputs of these shapes, or may do so, because that depends on values."""
    run, outline = copied(model), Outline()
    try:
        with evaluating(run), in_small_operations(run), _Shapes(outline):
            call(run, example_inputs)
    except Exception:  # the user's code may raise anything
        return outline.failed
    return True


def record(model: nn.Module, example_inputs: ExampleInputs, *, values: bool = False) -> Graph:
    """Run the model on example inputs and find its groups.

    If some weights are not read, a second pass also runs layers that only run in training (see `evaluating`).

    Args:
        model: not changed, and not run: each pass runs on a copy.
        example_inputs: as for a call: a tensor, a sequence of arguments, or a mapping of keyword arguments.
        values: compute all values, because shapes are known not to be enough.

    Raises:
        RuntimeError: the forward pass failed; names the module, and has the original error as its cause.
    """
    seen = _pass(model, example_inputs, auxiliary=False, values=values)
    auxiliary, flops, operations = False, seen.flops, seen.operations
    if seen.unread():
        with contextlib.suppress(RuntimeError):  # in training the model may need more arguments, such as targets
            again = _pass(model, example_inputs, auxiliary=True, values=seen.values)
            auxiliary = set(again.unread()) < set(seen.unread())
            seen = again if auxiliary else seen
    unread = [LeftAlone(name.removesuffix(".weight"), size, NOT_RUN) for name, size in seen.unread().items()]
    graph = find_groups(seen.notes)
    alone = (*graph.left_alone, *unread)
    return replace(
        graph,
        left_alone=alone,
        auxiliary=auxiliary,
        flops=flops,
        operations=operations,
        written=tuple(seen.written),
        values=seen.values,
    )


NOT_RUN = "it does not run on these example inputs"


def _pass(model: nn.Module, example_inputs: ExampleInputs, *, auxiliary: bool, values: bool) -> _Record:
    """One recorded pass: with shapes only if possible, otherwise (or with `values`) with all values."""
    outline = Outline()
    # A real error occurs again in the pass with values, and is reported there.
    with contextlib.suppress(Exception):
        if not values:
            run = copied(model)
            seen = _Record(run, outline, model)
            _run(run, example_inputs, seen, auxiliary=auxiliary)
            if not outline.failed:
                return seen
    run = copied(model)
    seen = _Record(run, lambda func, args, kwargs: func(*args, **kwargs), model)
    seen.values = True
    try:
        _run(run, example_inputs, seen, auxiliary=auxiliary)
    except OriginalWrittenError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"the example inputs do not fit the forward pass: {seen.modules[-1]} raised {type(error).__name__}: "
            f"{error}; expected inputs with which model(...) runs, got {describe(example_inputs)}"
        ) from error
    return seen


def _run(model: nn.Module, example_inputs: ExampleInputs, mode: _Record, *, auxiliary: bool) -> None:
    """Run one forward pass in a recording mode, and freeze the channels of the outputs."""
    names = {module: name for name, module in model.named_modules() if module is not model}

    def enter(module: nn.Module, _: Any) -> None:
        if module in names:
            mode.modules.append(names[module])

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if module in names:
            mode.modules.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        counter = flop_counter()
        total, labelled = counter.get_total_flops, mode.labelled
        few = FewSteps(labelled.of, labelled.put, values=mode.values, total=total, operations=mode.operations)
        with evaluating(model, auxiliary=auxiliary), in_small_operations(model), counter, mode, few:
            found = list(tensors_in(call(model, example_inputs)))  # in the mode: an iterator may compute its items
        mode.flops = total() + few.flops
    finally:
        for hook in hooks:
            hook.remove()
    for tensor in found:
        mode.notes.atoms.separations.extend(mode.labelled.of(tensor).pending)
        for plane in (*mode.labelled.of(tensor).planes, *mode.labelled.of(tensor).latent):
            mode.notes.atoms.freeze(plane, "model output")

"""Rules for elementwise operations, reductions, softmax and pooling."""

from collections.abc import Sequence

from nac_gpu.tracing.atoms import MEAN, Labels, Separation, varying
from nac_gpu.tracing.calls import Call
from nac_gpu.tracing.recorder import Notes, aligned, unfilled

#: Elementwise operations that lack the pointwise tag.
ELEMENTWISE = frozenset("hardswish _prelu_kernel prelu rrelu celu masked_fill threshold".split())
REDUCTIONS = frozenset(
    """sum mean amax amin max min var std var_mean std_mean logsumexp prod linalg_vector_norm norm argmax argmin aminmax
    median nanmedian mode kthvalue nansum any all count_nonzero""".split()
)
#: Combine values along a dimension and keep the dimension, if not always its size.
ALONG_DIM = frozenset(
    """_softmax _log_softmax softmax log_softmax _safe_softmax cumsum cumprod sort topk cummax cummin
    logcumsumexp""".split()
)
#: Combine values along several dimensions, or keep only some of them: Fourier transforms, triangles of matrices.
ALONG_DIMS = frozenset("_fft_r2c _fft_c2r _fft_c2c tril triu".split())
WINDOWS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample", "grid_sampler")


def fill(notes: Notes, call: Call) -> list[Labels]:
    """`fill_` and `zero_`: may overwrite only some of the channels, which keeps these apart from the others."""
    labels = notes.labels_of(call.args[0])
    for plane in labels.planes:
        notes.separate(plane, [], "only some channels are overwritten")
    return [Labels(labels.planes)]


def glu(notes: Notes, call: Call) -> list[Labels]:
    """GLU: channel i of one half gates channel i of the other, so both share an assignment."""
    tensor, dim = call.args[0], call.given.get("dim", -1) % call.args[0].ndim
    half, planes = tensor.shape[dim] // 2, []
    for plane in notes.planes(tensor):
        if dim in varying(plane):
            plane = notes.meet(plane.narrow(dim, 0, half), plane.narrow(dim, half, half))
        planes.append(plane)
    return [Labels(tuple(planes))]


def elementwise(notes: Notes, call: Call) -> list[Labels]:
    """An elementwise operation: channels at the same position share an assignment.

    A constant that differs between channels keeps them apart.
    """
    operands, ndim = call.tensors, call.outputs[0].ndim
    own = {id(tensor): [aligned(plane, ndim) for plane in notes.planes(tensor)] for tensor in operands}
    planes = notes.join(plane for tensor in operands for plane in own[id(tensor)])
    parameters = [tensor for tensor in operands if notes.labels_of(tensor).parameter]
    for plane in (plane for tensor in parameters for plane in own[id(tensor)]):
        notes.atoms.role(plane, MEAN)
    labels = {id(tensor): notes.labels_of(tensor) for tensor in operands}
    fixed = {key for key, found in labels.items() if found.parameter or found.constant}
    made = {varying(plane) for key in own.keys() - fixed for plane in own[key]}
    kept = []
    for plane in planes:
        apart = [notes.check_context(tensor, plane) for tensor in operands]
        if any(apart) and varying(plane) not in made and set(varying(plane)) <= {dim for dims in apart for dim in dims}:
            continue  # labels of parameters only, such as positions
        kept.append(unfilled(plane) if any(apart) else plane)
    parameter = all(notes.labels_of(tensor).parameter for tensor in operands)
    return call.each(Labels(tuple(kept), parameter))


def reduction(notes: Notes, call: Call) -> list[Labels]:
    """A reduction (sum, mean, maximum, ...) over some dimensions, which the result lacks or has with size 1."""
    given = call.given
    if "other" in given:  # torch.max(a, b)
        return elementwise(notes, call)
    tensor, dims = call.args[0], given.get("dim", call.default("dim"))
    if dims is None or dims == []:
        dims = range(tensor.ndim)
    reduced = {dim % tensor.ndim for dim in (dims if isinstance(dims, Sequence) else [dims])}
    pending: list[Separation] = []
    kept = notes.mix(notes.planes(tensor), reduced, f"{call.name.strip('_')} is taken over channels", pending=pending)
    if not given.get("keepdim", False):
        kept = [plane.reshape([s for dim, s in enumerate(plane.shape) if dim not in reduced]) for plane in kept]
    return call.each(Labels(tuple(kept), pending=tuple(pending)))


def along_dim(notes: Notes, call: Call) -> list[Labels]:
    """Softmax, cumulative sums and similar operations: values are combined, but channels keep their positions."""
    tensor, planes = call.args[0], notes.planes(call.args[0])
    dim = call.given.get("dim", -1) % tensor.ndim
    left = notes.mix(planes, {dim}, f"{call.name.strip('_')} is taken over channels")
    same = all(output.shape == tensor.shape for output in call.outputs)  # the largest k have positions of their own
    return call.each(Labels(planes if same else tuple(left)))


def along_dims(notes: Notes, call: Call) -> list[Labels]:
    """Operations on all values along some dimensions at once, which leave channels along the others where they are."""
    tensor = call.args[0]
    dims = {dim % tensor.ndim for dim in call.given.get("dim", (-2, -1))}
    reason = f"{call.name.strip('_')} is taken over channels"
    return call.each(Labels(tuple(notes.mix(notes.planes(tensor), dims, reason))))


def windows(notes: Notes, call: Call) -> list[Labels]:
    """Pooling and resampling with windows over the last one, two or three dimensions."""
    windows = next(size for size in (1, 2, 3) if f"{size}d" in call.name)
    ndim = call.args[0].ndim
    notes.freeze(call.tensors[1:], f"{call.name} is taken at values that are channels")
    dims = set(range(ndim - windows, ndim))
    reason = f"{call.name} is taken over channels"
    return call.each(Labels(tuple(notes.mix(notes.planes(call.args[0]), dims, reason, shaped=True))))

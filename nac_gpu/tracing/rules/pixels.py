"""Rules for operations that turn channels into pixels and pixels into channels."""

from nac_gpu.tracing.atoms import CHANNELS, NONE, Labels, plane_along
from nac_gpu.tracing.calls import Call
from nac_gpu.tracing.recorder import Notes


def pixel_shuffle(notes: Notes, call: Call) -> list[Labels]:
    """Blocks of r² channels become r x r pixels of one channel: blocks are merged as a whole."""
    tensor = call.args[0]
    return _whole_blocks(notes, call, tensor.ndim - 3, call.args[1] ** 2, tensor.ndim - 3)


def col2im(notes: Notes, call: Call) -> list[Labels]:
    """Fold: a block of channels for each position of a window becomes one channel; windows that overlap are summed."""
    tensor, (height, width) = call.args[0], call.args[2]
    return _whole_blocks(notes, call, tensor.ndim - 2, height * width, call.outputs[0].ndim - 3)


def _whole_blocks(notes: Notes, call: Call, dim: int, size: int, made: int) -> list[Labels]:
    """Blocks of `size` channels along a dimension become one channel each, along dimension `made` of the output."""
    tensor, out = call.args[0], call.outputs[0]
    channels = notes.along(tensor, dim)
    if channels is None or len(notes.planes(tensor)) > 1:
        notes.freeze([tensor], f"operation {call.name} moves other dimensions than channels")
        return [Labels()]
    blocks = channels.reshape(-1, size)
    partial = (blocks < 0).any(1)
    notes.freeze_planes([blocks[partial]], "channels meet values that are not channels")
    notes.atoms.unite(blocks, blocks[:, :1])
    return [Labels((plane_along(blocks[:, 0].masked_fill(partial, NONE), made, out.ndim),))]


def im2col(notes: Notes, call: Call) -> list[Labels]:
    """Unfold: each channel becomes a block of channels, one for each position of a window."""
    tensor, (height, width) = call.args[0], call.args[1]
    dim, out = tensor.ndim - 3, call.outputs[0]
    channels = notes.along(tensor, dim)
    if channels is None or len(notes.planes(tensor)) > 1:
        notes.freeze([tensor], f"operation {call.name} moves other dimensions than channels")
        return [Labels()]
    return [Labels((plane_along(channels.repeat_interleave(height * width), out.ndim - 2, out.ndim),))]


def channel_shuffle(notes: Notes, call: Call) -> list[Labels]:
    """Channels (group, channel) become (channel, group): channels merge with the same assignment in all groups."""
    tensor, groups = call.args
    channels = notes.along(tensor, 1)
    if channels is None or len(notes.planes(tensor)) > 1:
        notes.freeze([tensor], f"operation {call.name} moves other dimensions than channels")
        return [Labels()]
    rows = channels.reshape(groups, -1)
    notes.atoms.unite(rows, rows[:1], CHANNELS)
    return [Labels((plane_along(rows.t().flatten(), 1, tensor.ndim),))]


def unpool(notes: Notes, call: Call) -> list[Labels]:
    """Values are put back to where a maximum was: each channel to its own positions."""
    values, places = call.args[:2]
    dims = range(values.ndim - (3 if "3d" in call.name else 2), values.ndim)
    planes = notes.join([*notes.planes(values), *notes.planes(places)])
    for plane in planes:
        for tensor in (values, places):
            notes.check_context(tensor, plane)
    return [Labels(tuple(notes.mix(planes, dims, f"{call.name} is taken over channels", shaped=True)))]

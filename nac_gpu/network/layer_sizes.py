"""Size attributes of PyTorch's layers: which they are, and their update to the shapes of their tensors."""

from torch import Tensor, nn

from nac_gpu.network.attention import shrink
from nac_gpu.network.kept_numbers import is_transposed_linear


def set_sizes(module: nn.Module) -> None:
    """Set a layer's size attributes (`in_features`, `out_channels`, ...) from the shapes of its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        _set_convolution(module)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = module.running_mean if module.running_mean is not None else module.weight
        assert isinstance(tensor, Tensor), "a normalisation without tensors has no sizes"
        module.num_features = len(tensor)
    elif isinstance(module, nn.GroupNorm):
        if module.num_groups == module.num_channels:
            module.num_groups = len(module.weight)
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.RNNBase):
        module.input_size = module._flat_weights[0].shape[1]  # pyright: ignore[reportOptionalMemberAccess]
        weight = module.get_parameter("weight_hh_l0")
        if module.proj_size:
            module.proj_size = weight.shape[1]
            module.hidden_size = module.get_parameter("weight_hr_l0").shape[1]
        else:
            module.hidden_size = weight.shape[1]
    elif isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]
    elif isinstance(module, nn.MultiheadAttention):
        weight = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
        if len(weight) != module.embed_dim * (1 if module.in_proj_weight is None else 3):
            shrink(module)
    elif isinstance(getattr(module, "running_mean", None), Tensor) and hasattr(module, "num_features"):
        vars(module)["num_features"] = len(module.get_buffer("running_mean"))  # BatchNorm of other libraries, frozen
    elif is_transposed_linear(module):
        weight = module.get_parameter("weight")
        vars(module).update(nx=weight.shape[0], nf=weight.shape[1])


def _set_convolution(module: nn.modules.conv._ConvNd) -> None:
    rows, columns = (1, 0) if module.transposed else (0, 1)
    made, read = module.weight.shape[rows], module.weight.shape[columns]
    if module.groups == module.in_channels and module.groups > 1:  # depthwise, with one or more kernels per channel
        times = module.out_channels // module.groups
        module.groups = read if module.transposed else made // times
    module.out_channels, module.in_channels = made, read
    if module.transposed:
        module.out_channels *= module.groups
    else:
        module.in_channels *= module.groups

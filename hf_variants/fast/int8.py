"""Weights of 8 bits: a quarter of the bytes that a step of decoding has to read."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..model.axis import quote
from ..model.embedding import RoundedScaleEmbedding, ScaledEmbedding
from ..model.linear import OwnDtypeLinear, UnfusedBiasLinear
from ..model.modeling_variant import VariantPreTrainedModel


METHOD = "hf_variants_int8"
# Classes whose `forward` is a product with their weight, and a bias.
LINEAR = (nn.Linear, UnfusedBiasLinear, OwnDtypeLinear)
# Classes whose `forward` is a row of their weight, times `embed_scale` where there is one.
EMBEDDINGS = (nn.Embedding, ScaledEmbedding, RoundedScaleEmbedding)
# Up to this number of rows, the kernel for integers is faster than a product with the weight in the input's dtype.
MOST_ROWS = 16
# What that kernel takes inputs in: it has vector instructions for this dtype, and none for float32.
KERNEL_DTYPE = torch.bfloat16
# What it takes for granted, and does not check: it reads so many columns at a time (rows of the weight four at a time),
# from addresses that are multiples of their bytes.
KERNEL_COLUMNS, KERNEL_ROWS, KERNEL_BYTES = 16, 4, 64


def round_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Every row of a matrix as integers from -127 to 127 times one number.

    Args:
        weight: (out, in), any float dtype.

    Returns:
        int8 (out, in), and float32 (out,), such that the product is the weight but for at most half of that number.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1) / 127
    # A row of zeros stays one.
    integers = torch.round(weight / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1))
    return integers.clamp_(-127, 127).to(torch.int8), scale


class Int8Rows(nn.Module):
    """
    A matrix whose rows are 8-bit integers times one float32 each: `weight` (out, in) and `weight_scale` (out,).

    Args:
        rows, columns: out and in.
    """

    def __init__(self, rows: int, columns: int, device: torch.device | str | None = None):
        super().__init__()
        weight = torch.zeros((rows, columns), dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.zeros(rows, device=device), requires_grad=False)

    def round(self, weight: torch.Tensor) -> None:
        """Take over a matrix of floats."""
        integers, scale = round_rows(weight)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def suits_kernel(self) -> bool:
        """Whether the kernel for integers may read the matrix where it lies."""
        rows, columns = self.weight.shape
        return (
            columns % KERNEL_COLUMNS == 0
            and rows % KERNEL_ROWS == 0
            and self.weight.device.type == "cpu"
            and self.weight.is_contiguous()
            and self.weight.data_ptr() % KERNEL_BYTES == 0
        )

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)


class Int8Linear(Int8Rows):
    """
    What `nn.Linear` computes, with a weight of 8 bits.

    Args:
        in_features, out_features, bias: as `nn.Linear`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, device: torch.device | str | None = None):
        super().__init__(out_features, in_features, device)
        self.register_buffer("ones", torch.ones(out_features, dtype=KERNEL_DTYPE, device=device), persistent=False)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False) if bias else None

    def reset_buffers(self) -> None:
        init.ones_(self.ones)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, in_features) -> (rows, out_features), in the input's dtype."""
        needs_gradient = torch.is_grad_enabled() and rows.requires_grad
        if rows.shape[0] <= MOST_ROWS and not needs_gradient and self.suits_kernel():
            # A copy, since memory of torch's own is aligned. The scale is left to float32, which the kernel would round.
            copy = rows.to(KERNEL_DTYPE, memory_format=torch.contiguous_format, copy=True)
            product = torch._weight_int8pack_mm(copy, self.weight, self.ones).float()
        else:
            product = F.linear(rows, self.weight.to(rows.dtype))
        product = product * self.weight_scale
        if self.bias is not None:
            product = product + self.bias
        return product.to(rows.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), in the input's dtype."""
        rows = self.product(hidden_states.reshape(-1, self.in_features))
        return rows.view(*hidden_states.shape[:-1], self.out_features)


class Int8Embedding(Int8Rows):
    """
    What `nn.Embedding` looks up, with rows of 8 bits, in float32.

    Args:
        num_embeddings, embedding_dim: as `nn.Embedding`.
        embed_scale: multiplies what is looked up.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        embed_scale: float,
        device: torch.device | str | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.embed_scale = embed_scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(...,) -> (..., embedding_dim)."""
        return self.weight[input_ids] * (self.weight_scale[input_ids] * self.embed_scale).unsqueeze(-1)


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """What a config says of a model with weights of 8 bits: `quant_method` alone."""

    def __init__(self, **kwargs):
        self.quant_method = METHOD


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """Has `from_pretrained` load what `quantize_int8` made and `save_pretrained` wrote, or make it of what it loads."""

    requires_calibration = False

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        if self.pre_quantized:
            replace_matrices(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        if not self.pre_quantized:
            round_matrices(model)
        # What lies in a file that is read as memory starts anywhere.
        moved: dict[int, nn.Parameter] = {}
        for module in model.modules():
            if isinstance(module, Int8Rows) and module.weight.data_ptr() % KERNEL_BYTES:
                weight = module.weight
                module.weight = moved.setdefault(id(weight), nn.Parameter(weight.clone(), requires_grad=False))

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        floats(model, dtype or torch.float32)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def replacement(module: nn.Linear | nn.Embedding) -> Int8Rows:
    """The module of 8 bits, without content, that takes the place of one of `LINEAR` or `EMBEDDINGS`."""
    device = module.weight.device
    if type(module) in LINEAR:
        return Int8Linear(module.in_features, module.out_features, module.bias is not None, device)
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
    return Int8Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, scale, device)


def matrices(model: VariantPreTrainedModel) -> dict[str, nn.Module]:
    """
    Name -> linear layers, and embeddings of tokens: where the bytes are. Tables of positions and of biases stay.

    Raises:
        ValueError: naming what of the config computes something else with its matrix.
    """
    refuse(model)
    tables = {id(stack.embed_tokens) for stack in model.modules() if hasattr(stack, "embed_tokens")}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in LINEAR or (type(module) in EMBEDDINGS and id(module) in tables)
    }


def refuse(model: nn.Module) -> None:
    """`ValueError` for a model that cannot have weights of 8 bits."""
    if not isinstance(model, VariantPreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a model of this package. Convert it with `hf_variants.from_native` first."
        )
    config = model.config
    stacks = [config.encoder, config.decoder] if config.is_encoder_decoder else [config]
    fields = sorted({name for stack in stacks for name in ("lm_head_normalized",) if getattr(stack, name)})
    if fields:
        raise ValueError(
            f"Weights of 8 bits are multiplied as they are, and {quote(fields)} computes with another weight than is "
            "stored. Switch it off, or leave the model in floats."
        )


def replace_matrices(model: VariantPreTrainedModel) -> None:
    """Put modules of 8 bits, without content, in the place of matrices."""
    for name, module in matrices(model).items():
        model.set_submodule(name, replacement(module))


def round_matrices(model: VariantPreTrainedModel) -> None:
    """The same, with the content rounded; what is tied stays one tensor."""
    rounded: dict[int, Int8Rows] = {}
    for name, module in matrices(model).items():
        new = replacement(module)
        first = rounded.get(id(module.weight))
        if first is None:
            new.round(module.weight)
            rounded[id(module.weight)] = new
        else:
            new.weight = first.weight
            new.weight_scale = nn.Parameter(first.weight_scale.detach().clone(), requires_grad=False)
        if getattr(module, "bias", None) is not None:
            new.bias = nn.Parameter(module.bias.detach().float(), requires_grad=False)
        new.train(module.training)
        model.set_submodule(name, new)


def floats(model: VariantPreTrainedModel, dtype: torch.dtype) -> None:
    """Put the modules that the config asks for in the place of those of 8 bits, with the same, rounded, values."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    weights: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, Int8Rows):
            continue
        new = plain.get_submodule(name).to_empty(device=module.weight.device)
        if hasattr(new, "reset_buffers"):
            new.reset_buffers()
        weight = (module.weight * module.weight_scale.unsqueeze(1)).to(dtype)
        new.weight = weights.setdefault(id(module.weight), nn.Parameter(weight))
        if getattr(module, "bias", None) is not None:
            new.bias = nn.Parameter(module.bias.detach().to(dtype))
        new.train(module.training)
        model.set_submodule(name, new)


def quantize_int8(model: VariantPreTrainedModel) -> VariantPreTrainedModel:
    """
    Round the linear layers and the token embeddings of a model to 8 bits, in place: every row to integers times one number.

    What is between them is computed in float32. The model decodes, saves and loads (where this package is installed); it
    does not train, and it is no native checkpoint's equal any more.

    Args:
        model: ours, with or without a head, in any float dtype on the CPU.

    Returns:
        the model.

    Raises:
        ValueError: if it is not ours, if it is quantised or has adapters, or if a field of its config stands in the way,
            by name.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("The model has adapters, which would be rounded apart from it. Merge them first.")
    refuse(model)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("The model is quantised already. Load it in floats to round it to 8 bits.")
    model.float()
    round_matrices(model)
    config = Int8Config()
    model.config.quantization_config = config
    model.hf_quantizer = Int8Quantizer(config, pre_quantized=True)
    model.config.dtype = torch.float32
    return model

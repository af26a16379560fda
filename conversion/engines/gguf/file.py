"""Writing the file: tensors in their number formats and keys in their types, with the writer of the package `gguf`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...gguf_files.container import gguf_package


# As users call them, and the package's number formats.
FORMATS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
OF_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F32"}


def kept_in_float32() -> set[str]:
    """Names of tensors, without layer and suffix, that llama.cpp reads in float32 alone."""
    tensor, names = gguf_package().MODEL_TENSOR, gguf_package().TENSOR_NAMES
    kinds = (tensor.POS_EMBD, tensor.TOKEN_TYPES, tensor.ENC_ATTN_REL_B, tensor.DEC_ATTN_REL_B)
    return {names[kind].rpartition(".")[2] for kind in kinds}


def format_of(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """
    The number format of a tensor.

    Args:
        wanted: for matrices; vectors and what llama.cpp adds to activations stay in float32, and so does a matrix in F16
            whose rows are no whole blocks.
    """
    package = gguf_package()
    if len(shape) < 2 or name.removesuffix(".weight").rpartition(".")[2] in kept_in_float32() or "_norm." in name:
        return "F32"
    block, _ = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[wanted]]
    return wanted if shape[-1] % block == 0 else "F16"


def write_file(
    path: Path, architecture: str, keys: Mapping[str, Any], tensors: Iterable[tuple[str, torch.Tensor]], wanted: str
) -> list[str]:
    """
    Write a file.

    Args:
        tensors: as they lie in the file.
        wanted: the number format of matrices.

    Returns:
        names of the matrices in another one.
    """
    package = gguf_package()
    kind = package.GGMLQuantizationType
    writer = package.GGUFWriter(path, architecture)
    others = []
    add_keys(writer, keys)
    writer.add_file_type(package.LlamaFileType["ALL_F32" if wanted == "F32" else f"MOSTLY_{wanted}"])
    if wanted == "Q8_0":
        writer.add_quantization_version(package.GGML_QUANT_VERSION)
    for name, tensor in tensors:
        form = format_of(name, tuple(tensor.shape), wanted)
        if form not in (wanted, "F32"):
            others.append(name)
        array = tensor.detach().float().contiguous().numpy()
        writer.add_tensor(name, package.quantize(array, kind[form]), raw_dtype=kind[form])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return others


def add_keys(writer: Any, keys: Mapping[str, Any]) -> None:
    """Keys in the types that llama.cpp expects: counts without sign, real numbers in float32."""
    for name, value in keys.items():
        if isinstance(value, (bool, np.bool_)):
            writer.add_bool(name, bool(value))
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif name.endswith("precompiled_charsmap"):
            writer.add_array(name, bytes(value))
        else:
            writer.add_array(name, list(value))

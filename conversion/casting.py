"""In which dtype weights come out."""

from collections.abc import Iterable, Iterator, Mapping

import torch

from . import tensor_files
from .errors import ConversionError


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ConversionError(f"{dtype!r} is not a floating-point dtype. Use float32, bfloat16 or float16.")
    return named


def dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def cast(
    tensors: Iterable[tuple[str, torch.Tensor | tensor_files.Unread]], dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor | tensor_files.Unread]]:
    """The tensors in another dtype."""
    return ((name, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor) for name, tensor in tensors)


def cast_headers(headers: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    if dtype is None:
        return dict(headers)
    return {name: header.to(dtype) if header.is_floating_point() else header for name, header in headers.items()}


def refuse_to_verify_a_cast(verify: bool, stored: set[torch.dtype], dtype: torch.dtype | None) -> None:
    if verify and dtype is not None and stored != {dtype}:
        names = ", ".join(sorted(map(str, stored)))
        raise ConversionError(
            f"`verify` compares values bit by bit, and `dtype` {dtype} rounds the source's, which are {names}. "
            "Leave one of the two out."
        )

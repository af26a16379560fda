"""The packages that write and run ONNX files."""

from typing import Any

from ...errors import ConversionError


def onnx_packages() -> tuple[Any, Any, Any]:
    """`onnx_ir`, `onnxscript` and `onnxruntime`."""
    try:
        import onnx_ir
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise ConversionError(
            "ONNX files are written and run with the packages `onnxscript` and `onnxruntime`, which are not installed. "
            "Install hf-variants with the extra `onnx`."
        ) from error
    return onnx_ir, onnxscript, onnxruntime

"""From a model to an ONNX graph, through `torch.export`."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .graphs import BATCH, LENGTH, PAST, SOURCE, TARGET, Graph, Tensor
from .package import onnx_packages


# RMSNorm and attention are single operators from this one on.
OPSET = 23
LOGGERS = ("torch.onnx", "torch.onnx._internal.exporter", "onnxscript", "onnx_ir")


class _Runner(nn.Module):
    """What `torch.export` traces: a module whose inputs are those of the graph."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.model = graph.model
        self.run = graph.run

    def forward(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return self.run(*tensors)


def traced(graph: Graph) -> Any:
    """
    The graph as an `onnx_ir.Model`, with the parameters as initialisers under their names in the model. An input that
    nothing depends on is left out.
    """
    inputs = [tensor.example() for tensor in graph.inputs]
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            _Runner(graph), (inputs,), dynamo=True, dynamic_shapes=([_dynamic(tensor) for tensor in graph.inputs],),
            input_names=[tensor.name for tensor in graph.inputs], output_names=[tensor.name for tensor in graph.outputs],
            opset_version=OPSET, optimize=False, verbose=False,
        )  # fmt: skip
        model = program.model
        parameters = {f"model.{name}" for name in graph.model.state_dict()}
        _optimize(model, parameters)
    for name, value in list(model.graph.initializers.items()):
        renamed = name.removeprefix("model.")
        if renamed != name and renamed not in model.graph.initializers:
            value.name = renamed
    _name_dimensions(model, graph)
    return model


def _optimize(model: Any, parameters: set[str]) -> None:
    """
    Constants are computed, RMSNorm becomes one operator, and what is left over goes. Not by the optimizer's own list of
    passes: its rules take an addend up to 1e-8 for zero, which some norms have for their epsilon, and a factor within 1e-5
    of one for one.
    """
    ir, onnxscript, _ = onnx_packages()
    common = ir.passes.common
    onnxscript.optimizer.inline(model)
    # What the first round computes lets the second see more shapes.
    for _ in range(2):
        onnxscript.optimizer.fold_constants(model, should_fold=lambda node: _folds(node, parameters))
        common.RemoveUnusedNodesPass()(model)
    onnxscript.rewriter.onnx_fusions.fuse(model)
    for one in (
        common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(), common.CommonSubexpressionEliminationPass(), common.OutputFixPass(),
        common.NameFixPass(),
    ):  # fmt: skip
        one(model)


def _folds(node: Any, parameters: set[str]) -> bool | None:
    """Parameters stay what they are, under their names; runtimes fold them on loading. Of others, the optimizer decides."""
    return False if any(value is not None and value.name in parameters for value in node.inputs) else None


def _dynamic(tensor: Tensor) -> dict[int, Any]:
    """Named dimensions are one wherever they occur; of a sum, tracing finds out what it is."""
    one = {name: torch.export.Dim(name) for name in (BATCH, LENGTH, PAST, SOURCE, TARGET)}
    return {
        axis: one.get(dim, torch.export.Dim.DYNAMIC) for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)
    }


def _name_dimensions(model: Any, graph: Graph) -> None:
    ir, *_ = onnx_packages()
    for values, tensors in ((model.graph.inputs, graph.inputs), (model.graph.outputs, graph.outputs)):
        declared = {tensor.name: tensor.shape for tensor in tensors}
        for value in list(values):
            value.shape = ir.Shape(declared[value.name])
            if values is model.graph.inputs and not value.uses():
                values.remove(value)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporter says of packages that are not needed, and of itself."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    try:
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

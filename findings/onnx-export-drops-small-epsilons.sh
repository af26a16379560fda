#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2: exported to ONNX, a norm with an epsilon of 1e-8 or less has none.
#
# `torch.onnx.export` runs onnxscript's optimizer by default, which takes an addend for zero where all of its numbers are at most 1e-8
# away from it. An epsilon is such an addend: of `x * rsqrt(mean(x^2) + 1e-8)` the addition is gone, and a row of zeros, as padding
# that is masked to zero leaves it, becomes NaN. With 1e-6 the addition stays; with `optimize=False` too.
# The good guess that this defeats: an optimizer's rewriting keeps what a graph computes.
#
# Seen: NaN for a row of zeros at 1e-8 and 1e-12, zeros at 1e-6; zeros for all three without the optimizer, as torch has them.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import numpy
import onnxruntime
import torch


class Norm(torch.nn.Module):
    def __init__(self, epsilon):
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


rows = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -2.0, 3.0, 0.5]])
for epsilon in (1e-6, 1e-8, 1e-12):
    expected = Norm(epsilon)(rows).numpy()
    for optimize in (True, False):
        program = torch.onnx.export(Norm(epsilon), (rows,), dynamo=True, optimize=optimize, verbose=False)
        program.save("norm.onnx")
        (found,) = onnxruntime.InferenceSession("norm.onnx").run(None, {"x": rows.numpy()})
        adds = "Add" in [node.op_type for node in program.model.graph]
        print(f"{epsilon:g}, {'optimized' if optimize else 'as traced'}:", "addition kept," if adds else "no addition,",
              "row of zeros becomes", found[0].tolist())
        assert numpy.allclose(found[1], expected[1], atol=1e-6)
        dropped = optimize and epsilon <= 1e-8
        assert adds is not dropped
        assert numpy.isnan(found[0]).all() if dropped else (found[0] == expected[0]).all()
PYTHON

#!/usr/bin/env bash
# CTranslate2 4.8.5: quantising a spec whose weights are the arrays of a model that lives on.
#
# A spec keeps the arrays that it is given, as they are. `optimize(quantization="int8")` multiplies each row of a weight by its
# scale inside that very array before it rounds into a new one, so the caller's model, which shares the memory (`Tensor.numpy()`
# does), is left with other weights: of 127 at most where they were of 3. bfloat16, float16 and no quantization leave them.
# The good guess that this defeats: a conversion reads weights, and a model can be converted to several quantizations in turn,
# or compared with what came out of it.
#
# Seen: int8 and int8_float32 change the array, None and float16 do not; a copy given instead stays right.
# 2026-11-29
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ctranslate2==4.8.5 numpy==2.3.5 setuptools==80.9.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import numpy as np
from ctranslate2.specs.common_spec import LinearSpec

seen = {}
for quantization in (None, "float16", "int8", "int8_float32"):
    weights = np.random.default_rng(0).standard_normal((8, 16), dtype=np.float32)
    before = weights.copy()
    spec = LinearSpec()
    spec.weight = weights
    spec.validate()
    spec.optimize(quantization=quantization)
    seen[quantization] = bool((weights == before).all())
    print(quantization, "kept" if seen[quantization] else f"changed, up to {np.abs(weights).max():.1f}")
assert seen == {None: True, "float16": True, "int8": False, "int8_float32": False}, seen
PYTHON

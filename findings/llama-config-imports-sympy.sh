#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: what it takes to make a config.
#
# A config is fields and checks, and most config classes need what PreTrainedConfig needs. Eighteen, Llama's among them, take their
# activation's check from `utils.type_validators`, which imports the activations, by way of them the kernels' integration and
# the loader of weights, and with it torch's DTensor, sympy and, where it is installed, accelerate: some 900 modules and 80 MB more
# than GPT-2's, before a tensor is made. A tool that reads config.json files alone pays it for a Llama and not for a GPT-2.
# The good guess that this defeats: config classes cost alike, and none of them needs torch.distributed.
#
# Seen: GPT2Config: 1,387 modules, 242 MB, neither; LlamaConfig: 2,271 modules, 322 MB, sympy and torch.distributed.tensor.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
cat > loaded.py <<'PYTHON'
import sys

import transformers

getattr(transformers, sys.argv[1])()
heavy = [name for name in ("sympy", "torch.distributed.tensor") if name in sys.modules]
resident = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS"))
print(sys.argv[1], len(sys.modules), "modules,", int(resident) // 1024, "MB,", " and ".join(heavy) or "neither", file=sys.stderr)
print(len(heavy))
PYTHON
gpt2=$(venv/bin/python loaded.py GPT2Config)
llama=$(venv/bin/python loaded.py LlamaConfig)
[ "$gpt2" = 0 ] && [ "$llama" = 2 ]

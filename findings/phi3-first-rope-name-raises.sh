#!/usr/bin/env bash
# transformers 5.23.0: `"rope_scaling": {"type": "su", ...}`, as the first Phi-3 configs with long contexts were published.
#
# Phi3Config renames both names that were used before "longrope" ("su" and "yarn"). The check that wants the original context
# among the RoPE parameters is made between the two: a config with "yarn" gets the top-level `original_max_position_embeddings`
# copied in and loads, one with "su" is refused for the lack of it, though it stands in the same file.
# The good guess that this defeats: a name that the config class still translates can still be loaded.
#
# Seen: longrope and yarn give longrope; su raises a KeyError that names original_max_position_embeddings.
# 2026-11-29
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
from transformers import Phi3Config
from transformers.utils import logging

logging.set_verbosity_error()
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "original_max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 1,
}
outcomes = {}
for name in ("longrope", "yarn", "su"):
    scaling = {"type": name, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    try:
        outcomes[name] = Phi3Config(**SIZES, rope_scaling=scaling).rope_parameters["rope_type"]
    except KeyError as error:
        outcomes[name] = "raises" if "original_max_position_embeddings" in str(error) else str(error)
    print(name, outcomes[name])
assert outcomes == {"longrope": "longrope", "yarn": "longrope", "su": "raises"}
PYTHON

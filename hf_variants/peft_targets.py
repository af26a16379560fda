"""Default target modules for PEFT, in every table that peft has for the Llama shape, whose names ours are.

peft looks a model's `model_type` up in tables of its own and asks for `target_modules` where it finds nothing. It has
no way to register a type, and most of its tables are copies of one another, so each gets an entry.
"""

from peft.utils import constants


# Norms of the residual stream and inside its branches; slots without a norm are left alone. Not those on queries and
# keys, which none of peft's own entries names, and which may have no parameters where the others have some.
NORMS = [
    *(
        f"{sublayer}_{slot}"
        for sublayer in ("self_attn", "cross_attn", "mlp")
        for slot in ("pre_norm", "branch_norm", "post_norm")
    ),
    "sub_norm",
    "token_norm",
    "embedding_norm",
    "norm",
]

_SUFFIXES = ("_TARGET_MODULES_MAPPING", "_FEEDFORWARD_MODULES_MAPPING")
_LLAMA_NORMS = "input_layernorm"


def register(model_type: str) -> None:
    """Add a model type to every table of peft that has an entry for Llama, unless it is there already."""
    for name, table in vars(constants).items():
        if not name.endswith(_SUFFIXES) or not isinstance(table, dict) or "llama" not in table:
            continue
        targets = table["llama"]
        table.setdefault(model_type, list(NORMS) if _LLAMA_NORMS in targets else list(targets))

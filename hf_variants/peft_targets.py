"""Default target modules for PEFT, in every table that peft has for the Llama shape, whose names ours are.

peft looks a model's `model_type` up in tables of its own and asks for `target_modules` where it finds nothing. It has
no way to register a type, and most of its tables are copies of one another, so each gets an entry. Importing peft takes
longer than all of this package where bitsandbytes is installed, so the entries are made when something else imports it.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


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

TABLES = "peft.utils.constants"
_SUFFIXES = ("_TARGET_MODULES_MAPPING", "_FEEDFORWARD_MODULES_MAPPING")
_LLAMA_NORMS = "input_layernorm"


def register(*model_types: str) -> None:
    """Add model types to every table of peft that has an entry for Llama, now or as soon as peft is imported."""
    if TABLES in sys.modules:
        _enter(sys.modules[TABLES], model_types)
    else:
        sys.meta_path.insert(0, _WhenImported(model_types))


def _enter(constants: ModuleType, model_types: Sequence[str]) -> None:
    for name, table in vars(constants).items():
        if not name.endswith(_SUFFIXES) or not isinstance(table, dict) or "llama" not in table:
            continue
        targets = table["llama"]
        for model_type in model_types:
            table.setdefault(model_type, list(NORMS) if _LLAMA_NORMS in targets else list(targets))


class _WhenImported(MetaPathFinder):
    """Finds the module of tables as it would be found without it, once, and enters the types when it has run."""

    def __init__(self, model_types: Sequence[str]):
        self._model_types = model_types

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_enter(module: ModuleType) -> None:
                execute(module)
                _enter(module, self._model_types)

            spec.loader.exec_module = execute_and_enter  # type: ignore[method-assign]
        return spec

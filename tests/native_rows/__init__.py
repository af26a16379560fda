"""One row per native type: random choices over the type's options, at tiny sizes."""

import importlib
import pkgutil


def all_rows():
    """Every row of every module of this folder, by model type."""
    rows = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        rows |= {row.model_type: row for row in module.ROWS}
    return dict(sorted(rows.items()))

"""One row per native type: random choices over the type's options, at tiny sizes."""

import importlib
import pkgutil

from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def all_rows():
    """Every row of every module of this folder, by model type, of the types that this transformers has."""
    rows = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        rows |= {row.model_type: row for row in module.ROWS if row.reference or row.model_type in CONFIG_MAPPING}
    return dict(sorted(rows.items()))

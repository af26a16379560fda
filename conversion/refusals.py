"""Native model types that a dense, config-driven stack cannot express, by the mechanism it lacks."""

import difflib

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


MECHANISMS: dict[str, str] = {
    "mixtral": "mixture-of-experts feed-forward layers",
    "qwen2_moe": "mixture-of-experts feed-forward layers",
    "qwen3_moe": "mixture-of-experts feed-forward layers",
    "gpt_oss": "mixture-of-experts feed-forward layers",
    "deepseek_v3": "multi-head latent attention and mixture-of-experts layers",
    "mamba": "state-space layers",
    "mamba2": "state-space layers",
}


def sentence(model_type: str) -> str:
    """Why this type is not supported and what to do."""
    if model_type in MECHANISMS:
        return (
            f"{model_type} needs {MECHANISMS[model_type]}, which a dense stack does not have. "
            "Use the stock class of transformers for it."
        )
    if model_type in CONFIG_MAPPING_NAMES:
        return (
            f"{model_type} has no family here yet. Use the stock class of transformers for it, or add a family "
            "(CONTRIBUTING.md says how)."
        )
    close = difflib.get_close_matches(model_type, CONFIG_MAPPING_NAMES, n=1)
    return f"{model_type!r} is not a model type of transformers." + (f" Did you mean {close[0]}?" if close else "")

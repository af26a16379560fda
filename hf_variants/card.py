"""What a published variant says about itself: a model card, generated from the folder of a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

import hf_variants
import hf_variants.model_cards

from .describe import describe, load_config


TEMPLATE = Path(next(iter(hf_variants.model_cards.__path__))) / "template.md"

# our class -> (auto class, the Hub's name of the task)
TASKS = {
    "VariantForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "VariantForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "VariantForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "VariantForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "VariantForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "VariantForConditionalGeneration": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "VariantModel": ("AutoModel", "feature-extraction"),
    "VariantSeq2SeqModel": ("AutoModel", "feature-extraction"),
}


def model_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    language: str | list[str] | None = None,
) -> ModelCard:
    """
    The card of a saved variant.

    Args:
        folder: of the checkpoint.
        repo_id: where it will lie on the Hub; by default the usage code names the folder.
        license, base_model, language: for the card's metadata.

    Raises:
        ValueError: if the folder holds no variant.
    """
    folder = Path(folder)
    config = load_config(str(folder))
    class_name = (config.architectures or ["VariantModel"])[0]
    if class_name not in TASKS:
        raise ValueError(
            f"`architectures` names {class_name}, which is none of the models here. Save the model again."
        )
    auto_class, task = TASKS[class_name]
    title = (repo_id or folder.resolve().name).rpartition("/")[2]
    with torch.device("meta"):
        model = getattr(hf_variants, class_name)(config)
    decoder: Any = config.decoder if config.is_encoder_decoder else config
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag=task,
            license=license,
            base_model=base_model,
            language=language,
            model_name=title,
            tags=["hf-variants", "custom_code"],
        ),
        template_path=str(TEMPLATE),
        title=title,
        summary=_summary(config),
        origin=(config.native_leftovers or {}).get("model_type"),
        where=repo_id or str(folder),
        auto_class=auto_class,
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
        generates=model.can_generate(),
        architecture=describe(config),
        parameters=f"{model.num_parameters():,}",
        weights=f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:,.1f} MB",
        cache=f"{cache_bytes_per_token(decoder):,} bytes in bfloat16" if decoder.is_causal else None,
    )


def cache_bytes_per_token(config: "hf_variants.VariantConfig", bytes_per_value: int = 2) -> int:
    """What one more token adds to the key/value cache while no sliding window is full."""
    layers = [layer for layer in config.per_layer_config if "self_attn" not in getattr(layer, "skip", ())]
    return sum(2 * layer.num_key_value_heads * layer.head_dim * bytes_per_value for layer in layers)


def _summary(config) -> str:
    """One line: what kind of model, and what distinguishes it."""
    if config.is_encoder_decoder:
        encoder, decoder = _summary(config.encoder), _summary(config.decoder)
        return f"an encoder-decoder; encoder: {encoder}; decoder: {decoder}"
    kind = "a decoder" if config.is_causal else "an encoder"
    norm = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[config.norm_type]
    block = config.norm_placement if config.parallel_block == "none" else f"parallel, {config.norm_placement}"
    return (
        f"{kind} of {config.num_hidden_layers} layers, width {config.hidden_size}, {norm} ({block}), "
        f"{config.hidden_act} {config.ffn_type}, positions: {config.position_embedding_type}"
    )

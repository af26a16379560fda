"""One adapter for every variant: it reads off the model what there is, where TransformerLens has a file per family."""

from typing import Any

import torch
from torch import nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import EmbeddingBridge, UnembeddingBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model.embedding import NoTokenTypes
from ..model.modeling_variant import VariantModel, VariantPreTrainedModel
from ..model.normalization import RMSNorm
from ..model.positions import NoPositions
from .components import Added, DecoderBlock, VariantBlock, norm_component


# Modules of a stack that change the embeddings or what the head reads, and their names in TransformerLens.
AROUND = {
    "token_projection": "project_in",
    "embedding_projection": "project_in",
    "output_projection": "project_out",
}
POSITIONS = {
    "rope": "rotary",
    "learned": "standard",
    "sinusoidal": "standard",
    "alibi": "alibi",
    "relative_bias": "relative_positional_bias",
    "none": "none",
}


class VariantAdapter(ArchitectureAdapter):
    """
    Names for the parts of any model of ours.

    Layers are `blocks`, or `encoder_blocks` and `decoder_blocks`; norms before a sublayer `ln1` and `ln2`, on its output
    `ln1_post` and `ln2_post`, behind the residual `ln1_residual` and `ln2_residual`. What a layer does not have, has no
    name there.
    """

    # Folding and centring take pre-norm blocks of one kind for granted.
    supports_compatibility_mode = False

    def __init__(self, cfg: Any):
        super().__init__(cfg)
        self.cfg.attn_only = False
        self.cfg.attn_implementation = "eager"
        self.weight_processing_conversions: dict[str, Any] = {}
        self.component_mapping: dict[str, Any] = {}
        self._logits_of_head: Any = None

    def prepare_model(self, hf_model: PreTrainedModel) -> None:
        """Read off the model what there is."""
        super().prepare_model(hf_model)
        prefix = "" if hf_model.base_model is hf_model else f"{hf_model.base_model_prefix}."
        config = hf_model.config
        if config.is_encoder_decoder:
            self._add_stack(hf_model.base_model.encoder, f"{prefix}encoder.", "encoder_")
            self._add_stack(hf_model.base_model.decoder, f"{prefix}decoder.", "decoder_", DecoderBlock)
        else:
            self._add_stack(hf_model.base_model, prefix, "")
        stack = hf_model.base_model.decoder if config.is_encoder_decoder else hf_model.base_model
        self._describe(stack)
        self.supports_generation = hf_model.can_generate()
        self.supports_causal_loss = stack.config.is_causal and hasattr(hf_model, "lm_head")
        if isinstance(getattr(hf_model, "lm_head_transform", None), nn.Module):
            self.components["prediction_head"] = GeneralizedComponent("lm_head_transform", self.cfg)
        if hasattr(hf_model, "lm_head"):
            self.components["unembed"] = UnembeddingBridge("lm_head", self.cfg)
            self._logits_of_head = hf_model.logit_scaling

    def _describe(self, stack: VariantModel) -> None:
        """What TransformerLens asks its config for, of the stack whose tokens are predicted."""
        config, norm = stack.config, stack.norm
        self.cfg.normalization_type = None
        if isinstance(norm, nn.Module):
            self.cfg.normalization_type = "RMS" if isinstance(norm, RMSNorm) else "LN"
        self.cfg.positional_embedding_type = POSITIONS[config.position_embedding_type]
        self.cfg.attention_dir = "causal" if config.is_causal else "bidirectional"
        self.cfg.gated_mlp = all(layer.ffn_type == "glu" for layer in config.per_layer_config)
        self.cfg.parallel_attn_mlp = all(layer.parallel_block != "none" for layer in config.per_layer_config)

    def _add_stack(
        self, stack: VariantModel, path: str, prefix: str, block: type[VariantBlock] = VariantBlock
    ) -> None:
        names, cfg = self.components, self.cfg
        # TransformerLens looks for the embeddings of an encoder under their own name.
        inputs = "" if prefix == "encoder_" else prefix
        names[f"{inputs}embed"] = EmbeddingBridge(f"{path}embed_tokens")
        if not isinstance(stack.embed_positions, NoPositions):
            names[f"{inputs}pos_embed"] = Added(f"{path}embed_positions", cfg)
        for part, name in {"token_types": "token_type_embed", "task_types": "task_type_embed"}.items():
            if not isinstance(getattr(stack, part), NoTokenTypes):
                names[f"{inputs}{name}"] = Added(f"{path}{part}", cfg)
        for part, name in {"token_norm": "embed_token_ln", "embedding_norm": "embed_ln", "norm": "ln_final"}.items():
            if isinstance(norm := getattr(stack, part), nn.Module):
                before = inputs if part != "norm" else prefix
                names[f"{before}{name}"] = norm_component(f"{path}{part}", cfg, norm)
        for part, name in AROUND.items():
            if isinstance(getattr(stack, part), nn.Module):
                names[f"{prefix}{name}"] = GeneralizedComponent(f"{path}{part}", cfg)
        names[f"{prefix}blocks"] = block(f"{path}layers", cfg)

    def apply_output_logits_transform(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and soft cap, (..., vocabulary) -> the same."""
        return logits if self._logits_of_head is None else self._logits_of_head(logits)


def bridge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> TransformerBridge:
    """
    A model in TransformerLens: `run_with_cache`, `run_with_hooks` and its tools, with the model's own logits.

    Args:
        model: one of ours, on any device and in any dtype. It is changed: its modules are wrapped, and attention runs
            eager. It computes what it did.
        tokenizer: for tools that take text.

    Raises:
        ValueError: if it is not one of ours.
    """
    if not isinstance(model, VariantPreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a variant. Convert it with `from_native`, or give it to TransformerLens itself."
        )
    name = type(model).__name__
    ArchitectureAdapterFactory.register_adapter(name, VariantAdapter)
    return build_bridge_from_module(
        model, name, hf_config=model.config, tokenizer=tokenizer, model_name=model.config.name_or_path or name
    )


def logit_lens(bridge: TransformerBridge, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    What the model would predict if it ended there: the last norm, the head and all that stands around them.

    Args:
        bridge: of a model with a language-modelling head.
        hidden_states: of the residual stream behind a layer, (batch, length, hidden_size); of the decoder, where there are
            two stacks.

    Returns:
        logits, (batch, length, vocabulary).
    """
    model = bridge.original_model
    stack = model.base_model.decoder if model.config.is_encoder_decoder else model.base_model
    return model.logits_of(stack.output_projection(stack.norm(hidden_states)))

"""The models: one stack (decoder or encoder) with its heads, built from a `VariantConfig`."""

import dataclasses
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2CLS
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple, is_tracing, logging
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .adapters import AdapterGuard
from .arguments import CACHE, in_stock_order, order_of, with_one_name
from .attention import Attention, self_attention_half, with_source_half
from .axis import quote
from .block import Block
from .builder import (
    build_batch_statistics,
    build_cache_limit,
    build_loss,
    build_padding_mask,
    build_pooling,
    build_position_ids,
    build_token_classifier_loss,
    choice_classifier_parts,
    language_head_parts,
    next_sentence_parts,
    position_limit,
    sequence_classifier_parts,
    span_classifier_parts,
    stack_parts,
    token_classifier_parts,
)
from .configuration_variant import VariantConfig
from .custom_code import auto_map_of, write_code
from .distribution import Distribution
from .feed_forward import LEARNED_ACTIVATIONS, reset_activation
from .heads import ends_of_sequences
from .losses import chunked_loss, guard_fused_head, token_loss, warn_of_lost_terms
from .part import CALLS, Call, Part, built, states
from .positions import restarts, too_long
from .upload import Upload, now_in, remove_replaced_weights, written_since


logger = logging.get_logger(__name__)

CAUSAL_MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}
BIDIRECTIONAL_MASKS = {
    "full_attention": create_bidirectional_mask,
    "sliding_attention": create_bidirectional_sliding_window_mask,
}


def _attention_backend(attn_implementation: str) -> str | None:
    """The kind of an attention implementation, or `None` where transformers does not have it."""
    name = attn_implementation.removeprefix("paged|")
    if is_flash_attention_requested(requested_attention_implementation=name):
        return "flash_attention"
    return name if name in ("eager", "sdpa", "flex_attention") else None


def draw_matrix(module: nn.Linear | nn.Embedding, std: float, cutoff: float | None) -> None:
    """
    Draw a new matrix from a normal distribution, of which `cutoff` standard deviations on either side are kept, and set
    the bias to zero; so a frozen row of padding, unless there is a cutoff (ModernBERT's is drawn).
    """
    if cutoff is not None:
        init.trunc_normal_(module.weight, mean=0.0, std=std, a=-cutoff * std, b=cutoff * std)
    else:
        init.normal_(module.weight, mean=0.0, std=std)
    padding_idx = getattr(module, "padding_idx", None)
    # A slice does not know whether the weight was loaded.
    if padding_idx is not None and cutoff is None and not getattr(module.weight, "_is_hf_initialized", False):
        init.zeros_(module.weight[padding_idx])
    if getattr(module, "bias", None) is not None:
        init.zeros_(module.bias)


def slice_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    The positions whose logits are asked for: the last n (all for 0), those at the indices of a 1D tensor, or, for a
    2D tensor, row by row. (batch, length, width) -> (batch, kept, width).
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None) if logits_to_keep else slice(None), :]
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep, :]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep].unsqueeze(0)
    rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)[:, None]
    return hidden_states[rows, logits_to_keep]


def refuse_packing(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | dict | None, reason: str) -> None:
    """Raise if the position ids of a row restart, where `reason` says why its documents could not be told apart."""
    if position_ids is None or is_tracing(position_ids):
        return
    padding_mask = attention_mask if torch.is_tensor(attention_mask) and attention_mask.ndim == 2 else None
    if restarts(position_ids, padding_mask):
        raise ValueError(
            f"`position_ids` restart as those of packed documents do, and {reason}. Give every document a row of its "
            "own, with padding and an `attention_mask`."
        )


class VariantPreTrainedModel(AdapterGuard, Distribution, PreTrainedModel):
    """What every model has in common: initialisation, and which attention backends a config can use."""

    config: VariantConfig
    config_class = VariantConfig
    # The module that writes model cards, `hf_variants.card`, which does not travel with a checkpoint.
    cards: ModuleType | None = None
    # Positions at a time, where a language model's loss is computed in chunks; see `hf_variants.chunk_loss`.
    loss_chunk: int | None = None
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # Of a checkpoint with a pooler for the models that have one.
    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?pooler\."]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": Block,
        "attentions": OutputRecorder(Attention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(Attention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: VariantConfig, *args, **kwargs):
        # Before transformers chooses a backend: an unsupported one is refused there, by name, or not chosen.
        self._supports_sdpa = not config.unsupported_attention_features("sdpa")
        self._supports_flash_attn = not config.unsupported_attention_features("flash_attention")
        super().__init__(config, *args, **kwargs)
        self.argument_order = order_of(type(self), config)

    def takes_loss_in_chunks(self, labels: torch.Tensor | None) -> bool:
        """Whether a language model's loss is computed without all logits at once: in training, where that was asked for."""
        return (
            self.loss_chunk is not None
            and labels is not None
            and self.training
            and torch.is_grad_enabled()
            and not is_tracing(labels)
        )

    def finish_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """What the LM head gives -> logits, of the same shape."""
        return self.logit_scaling(logits)

    def labels_in_place(self, labels: torch.Tensor, shift_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Labels at the positions they are predicted from, (batch, length)."""
        return labels

    def chunked_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """The loss of (batch, length, hidden_size) without all logits at once; the others: see `causal_lm_loss`."""
        return chunked_loss(
            self.lm_head_transform,
            self.lm_head,
            self.finish_logits,
            self.loss_function,
            hidden_states,
            self.labels_in_place(labels, shift_labels),
            self.loss_chunk,
            num_items_in_batch,
        )

    def add_parts(self, parts: dict[str, Any]) -> None:
        """Build what the structure says, under its names."""
        for name, part in parts.items():
            setattr(self, name, built(part))

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        """Refuse a backend that would ignore what the config asks for, when it is built and when it is switched."""
        if attn_implementation is None and self.config.eager_by_default:
            attn_implementation = "eager"
        elif attn_implementation is None:
            if fields := self.config.unsupported_attention_features("sdpa"):
                logger.warning_once(
                    f"sdpa cannot compute {quote(fields)} of this config, so attention runs in eager mode. Pass "
                    "`attn_implementation` to choose another that can, and to silence this."
                )
        elif (backend := _attention_backend(attn_implementation)) and (
            fields := self.config.unsupported_attention_features(backend)
        ):
            able = [name for name in ("eager", "sdpa", "flex_attention", "flash_attention")
                    if not self.config.unsupported_attention_features(name)]  # fmt: skip
            raise ValueError(
                f"`attn_implementation` {attn_implementation} cannot compute {quote(fields)} of this config. "
                f"Use one of {', '.join(able)}."
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        As in transformers, and with the code, so that the folder also loads where this package is not installed.

        Args:
            push_to_hub: commit what is written to `repo_id`, by default named as the folder; see `push_to_hub`.
        """
        upload = None
        if push_to_hub:
            if kwargs.get("distributed_checkpoint"):
                raise ValueError(
                    "`push_to_hub` with `distributed_checkpoint` would upload weights without the code that they need. "
                    "Save without one of them, and call `push_to_hub` on the model."
                )
            kwargs.setdefault("repo_id", Path(save_directory).absolute().name)
            names = [field.name for field in dataclasses.fields(Upload)]
            upload = Upload(**{name: kwargs.pop(name) for name in names if name in kwargs})
        self._save(save_directory, upload, is_main_process=is_main_process, state_dict=state_dict, **kwargs)

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "50GB", **options) -> CommitInfo:
        """
        Upload the model, its code and its card to the Hub, in one commit. A README.md by hand that stands there is left
        alone, but for the tags.

        Args:
            repo_id: `owner/name`, or a name under your own; made if it does not exist.
            max_shard_size: as in `save_pretrained`.
            options: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr` and `tags`, as in
                transformers.
        """
        with tempfile.TemporaryDirectory() as folder:
            return self._save(folder, Upload(repo_id, **options), max_shard_size=max_shard_size)

    def _save(
        self, folder: str | os.PathLike, upload: Upload | None, is_main_process: bool = True, **kwargs
    ) -> CommitInfo | None:
        """Save, and upload what was written. Of several processes, only the first writes."""
        self.correct_ties()
        is_parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        writes = is_main_process and not (is_parallel and torch.distributed.get_rank())
        # Of a model with adapters that PEFT added in place, only those are saved.
        adapters_only = getattr(self, "_hf_peft_config_loaded", False)
        os.makedirs(folder, exist_ok=True)
        begun = now_in(folder)
        if writes and upload is not None:
            upload.tags = [*(self.model_tags or ()), *upload.tags]
            upload.prepare()
            upload.copy_remote_card(folder)
        if not adapters_only:
            self.config.auto_map = auto_map_of(self.config, type(self).__name__)
            if writes:
                write_code(folder)
        super().save_pretrained(folder, is_main_process=is_main_process, **kwargs)
        if not writes:
            return None
        keep_remote_card = True
        if not adapters_only:
            remove_replaced_weights(folder, begun)
            keep_remote_card = self._write_card(folder, upload)
        return upload and upload.send(folder, written_since(folder, begun), keep_remote_card)

    def _write_card(self, folder: str | os.PathLike, upload: Upload | None) -> bool:
        """Have the package write the card, where it is installed. Whether the Hub's is to stay, being by hand."""
        if self.cards is None:
            return True
        self.cards.write_card(folder, self, repo_id=upload and upload.repo_id)
        return upload is not None and upload.remote_card is not None and self.cards.is_by_hand(upload.remote_card)

    def _get_resized_lm_head(self, old_lm_head: nn.Linear, *args, **kwargs) -> nn.Linear:
        """As in transformers, which returns a plain `nn.Linear`: the head stays what it is, with the new parameters."""
        resized = super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        old_lm_head.weight, old_lm_head.bias = resized.weight, resized.bias
        if hasattr(old_lm_head, "unread_bias"):
            old_lm_head.unread_bias = nn.Parameter(resized.bias.detach().clone())
        old_lm_head.out_features = resized.out_features
        return old_lm_head

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Of an encoder-decoder, what belongs to neither stack is the decoder's.
        config = getattr(self.config, "decoder", self.config)
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()
        if getattr(module, "unread_bias", None) is not None:
            init.zeros_(module.unread_bias)
        if hasattr(module, "reset_weights"):
            module.reset_weights()
        elif isinstance(module, nn.Linear) and hasattr(module, "xavier_gain"):
            init.xavier_normal_(module.weight, gain=module.xavier_gain)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            # 0 stands for the default, as in transformers.
            std = getattr(module, "init_std", config.initializer_range or 0.02)
            if hasattr(module, "init_factor"):
                std = module.init_factor * self.config.initializer_range
            draw_matrix(module, std, config.initializer_cutoff_factor)
        elif isinstance(module, Attention):
            if module.has_sinks:
                std = config.initializer_range if config.initializer_sinks == "normal" else 0.0
                init.normal_(module.sinks, mean=0.0, std=std)
        elif isinstance(module, tuple(ACT2CLS[name] for name in LEARNED_ACTIVATIONS)):
            reset_activation(module)
        elif "RotaryEmbedding" not in type(module).__name__:
            super()._init_weights(module)
        if getattr(module, "init_weight", None) is not None:
            init.constant_(module.weight, module.init_weight)


class VariantModel(VariantPreTrainedModel):
    """The stack without a head: token ids to hidden states; `role` says what it stands in (`VariantConfig.has_pooler`)."""

    # Token ids to what enters the first layer, the layers, and what follows the last.
    parts = staticmethod(stack_parts)

    def __init__(self, config: VariantConfig, role: str = "base"):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.add_parts(self.parts(config, role))
        self.position_ids_of = build_position_ids(config)
        self.padding_mask_of = build_padding_mask(config)
        self.batch_statistics = build_batch_statistics(config)
        self.first_position = config.pad_token_id + 1 if config.position_ids_source == "input_ids" else 0
        # Those that are there: accelerate's FSDP looks for every name, and fails on one that it does not find.
        self._no_split_modules = {type(layer).__name__ for layer in self.layers}
        # Where transformers loads a model in float16.
        self._keep_in_fp32_modules = ["down_proj"] if config.ffn_output_in_float32 else None
        self.layer_types = list(config.layer_types)
        self.layerdrop = config.layerdrop
        self.mask_functions = CAUSAL_MASKS if config.is_causal else BIDIRECTIONAL_MASKS
        self.gradient_checkpointing = False
        self.post_init()

    def create_masks(
        self,
        attention_mask: torch.Tensor | dict | None,
        inputs_embeds: torch.Tensor,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None,
        packed: bool = False,
    ) -> dict[str, torch.Tensor | None]:
        """One mask per attention type that the stack has; `packed` documents do not see each other."""
        if isinstance(attention_mask, dict):
            return attention_mask
        arguments = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            CACHE: past_key_values,
        }
        if self.config.is_causal:
            arguments["position_ids"] = position_ids
        elif packed:
            # What transformers does for a decoder, and not for an encoder.
            documents = find_packed_sequence_indices(position_ids.expand(inputs_embeds.shape[0], -1))
            if documents is not None:
                arguments["and_mask_function"] = packed_sequence_mask_function(documents)
        return {kind: self.mask_functions[kind](**arguments) for kind in dict.fromkeys(self.layer_types)}

    def embed(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        task_type_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Token embeddings (batch, length, embedding_size) to what enters the first layer, (batch, length, hidden_size)."""
        hidden_states = self.token_norm(self.token_projection(self.multiply_embeddings(inputs_embeds)))
        hidden_states = self.token_types(hidden_states, token_type_ids)
        hidden_states = self.task_types(self.embed_positions(hidden_states, position_ids), task_type_ids)
        hidden_states = self.types_among_tokens(hidden_states, token_type_ids, self.embed_tokens)
        return self.embedding_projection(self.embedding_dropout(self.embedding_norm(hidden_states)))

    @in_stock_order
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        task_type_ids: torch.LongTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions | BaseModelOutputWithPoolingAndCrossAttentions:
        """
        Args:
            input_ids: (batch, length).
            attention_mask: (batch, past + length) with 1 at real tokens, a 4D mask, or one 4D mask per layer type.
            position_ids: (batch or 1, length). Ids that restart stand for documents packed into one row, which do not
                see each other, unless an encoder's 2D `attention_mask` says what it sees. The first label of each is the
                next token of another document: set it to -100, as transformers' `DataCollatorWithFlattening` does.
            past_key_values: a cache, updated in place. With cross-attention, the returned one also holds the projected
                source; a plain cache becomes one half of it.
            inputs_embeds: (batch, length, embedding_size), instead of `input_ids`.
            token_type_ids, task_type_ids: (batch, length).
            encoder_hidden_states: (batch, source length, width), for cross-attention; without them it is left out.
            encoder_attention_mask: (batch, source length) with 1 at real tokens, or a 4D mask.

        Returns:
            `last_hidden_state` (batch, length, hidden_size) and the cache, or `pooler_output` where there is a pooler;
            `hidden_states` and `attentions` on request.

        Raises:
            ValueError: if packed documents would see each other: with a decoder's 2D `attention_mask` or a cache passed in,
                in cross-attention, or in a batch of several rows with FlashAttention; or if a table of positions is
                shorter than the input. A graph being traced (`torch.compile`) cannot tell, and does not raise.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("`input_ids` and `inputs_embeds` are both set or both missing. Pass exactly one of them.")
        if encoder_hidden_states is not None and not self.config.add_cross_attention:
            raise ValueError(
                "`encoder_hidden_states` are given to a stack without cross-attention, which would ignore them. Set "
                "`add_cross_attention=True` in the config of a decoder, or leave them out."
            )
        if "cache" in kwargs:
            self.refuse_continuous_batching()
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        packed = position_ids is not None and self.packs_documents(
            position_ids, attention_mask, past_key_values, inputs_embeds.shape[0], encoder_hidden_states
        )
        makes_cache = use_cache and self.config.is_causal and not self.training
        # A decoder's mask comes from the position ids or from padding; an encoder's from both.
        if (
            attention_mask is None
            and past_key_values is None
            and not makes_cache
            and not (packed and self.config.is_causal)
        ):
            attention_mask = self.padding_mask_of(input_ids)
        # Before a new cache exists, so that packed documents are told apart whether or not one is wanted.
        masks = self.create_masks(
            attention_mask, inputs_embeds, self_attention_half(past_key_values), position_ids, packed
        )
        if encoder_hidden_states is not None:
            encoder_attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        padding_mask = attention_mask if torch.is_tensor(attention_mask) and attention_mask.ndim == 2 else None
        if use_cache and past_key_values is None and self.config.is_causal:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and encoder_hidden_states is not None:
            past_key_values = with_source_half(past_key_values)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = self.position_ids_of(input_ids, inputs_embeds, padding_mask, past)

        norm_arguments = self.batch_statistics.begin(self, attention_mask, input_ids, inputs_embeds)
        hidden_states = self.embed(inputs_embeds, position_ids, token_type_ids, task_type_ids)

        position_embeddings = {name: table(hidden_states, position_ids) for name, table in self.rotary_emb.items()}
        position_biases = self.position_bias(
            hidden_states, self_attention_half(past_key_values), padding_mask, self.layer_types
        )
        # A layer that is computed again in the backward pass would fill the cache twice.
        computed_twice = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer_idx, layer in zip(range(self.config.num_hidden_layers), self.layers, strict=False):
            if self.layerdrop and self.training and torch.rand(()) < self.layerdrop:
                continue
            hidden_states = layer(
                hidden_states,
                position_biases[layer_idx],
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                attention_mask=masks[self.layer_types[layer_idx]],
                position_embeddings=position_embeddings.get(self.rotary_names[layer_idx]),
                position_ids=position_ids,
                past_key_values=None if computed_twice else past_key_values,
                use_cache=use_cache,
                **norm_arguments,
                **kwargs,
            )
        hidden_states = self.output_projection(self.final_dropout(self.norm(hidden_states)))
        self.batch_statistics.end(self)
        if self.pooler is not None:
            return BaseModelOutputWithPoolingAndCrossAttentions(
                last_hidden_state=hidden_states,
                pooler_output=self.pooler(hidden_states),
                **{CACHE: past_key_values},
            )
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states, **{CACHE: past_key_values})

    def packs_documents(
        self,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        past_key_values: Cache | None,
        batch_size: int,
        encoder_hidden_states: torch.Tensor | None,
    ) -> bool:
        """Whether given position ids restart. Raise if the documents that this stands for would see each other."""
        # One token is no two documents: decoding goes no further.
        if position_ids.shape[-1] == 1:
            return False
        backend = _attention_backend(self.config._attn_implementation)
        is_own_mask = attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.ndim != 2)
        # Engines with an attention of their own tell requests apart by themselves.
        if is_own_mask or backend is None:
            return False
        if is_tracing(position_ids):
            return attention_mask is None and not self.config.is_causal
        if not restarts(position_ids, attention_mask):
            return False
        if encoder_hidden_states is not None:
            refuse_packing(position_ids, attention_mask, "cross-attention does not tell them apart")
        if attention_mask is not None and not self.config.is_causal:
            # What an encoder sees is what the mask says, in transformers.
            return False
        if attention_mask is not None:
            raise ValueError(
                "`position_ids` restart as those of packed documents do, and with an `attention_mask` the documents see "
                "each other. Leave the mask out, or pass a 4D one that separates them."
            )
        if past_key_values is not None:
            raise ValueError(
                "`position_ids` restart as those of packed documents do, and with `past_key_values` the documents see "
                "each other. Leave the cache out; `use_cache=True` makes a new one."
            )
        if backend == "flash_attention" and batch_size > 1:
            raise ValueError(
                "`position_ids` restart in a batch of several rows, and FlashAttention tells packed documents apart in "
                "one row only. Flatten the rows into one, or choose another `attn_implementation`."
            )
        if self.first_position and (position_ids == 0).any():
            raise ValueError(
                f"`position_ids` of packed documents restart at 0, and `position_ids_source` input_ids counts from "
                f"{self.first_position}. Add {self.first_position} to them."
            )
        return True

    def refuse_continuous_batching(self) -> None:
        """Raise if paged attention would ignore what the config asks for."""
        if fields := self.config.unsupported_attention_features("paged"):
            raise ValueError(
                f"Continuous batching ignores {quote(fields)} of this config. "
                "Use `generate` instead of `generate_batch`."
            )


class VariantForCausalLM(VariantPreTrainedModel, GenerationMixin):
    """A stack, usually a decoder, with a head that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    @staticmethod
    def parts(config: VariantConfig) -> dict[str, Any]:
        return {"model": Part(VariantModel, config=config, role="other"), **language_head_parts(config)}

    def __init__(self, config: VariantConfig):
        super().__init__(config)
        if not config.is_causal:
            logger.warning_once(
                "`is_causal` is False, so every token sees those it is to predict, unless they are masked. "
                "Use `VariantForMaskedLM` for an encoder, or set `is_causal=True`, if that is not meant."
            )
        self.vocab_size = config.vocab_size
        self.add_parts(self.parts(config))
        self.cache_limit = build_cache_limit(config)
        self.position_limit = position_limit(config)
        loss = build_loss(config, shifted=config.shift_labels)
        if loss is not None or not config.shift_labels:
            self.loss_function = loss or token_loss
        if not config.shift_labels:
            # By which the Trainer counts every label; of a loss that shifts, it leaves the first of each row out.
            self.loss_type = "ForMaskedLM"
        self.post_init()

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs,
    ) -> dict:
        """
        As in transformers (which looks for `inputs_embeds` in the signature), but without a cache whose keys were
        rotated for shorter inputs (Phi-3).

        Raises:
            ValueError: if a table of positions has come to its end. Only where there are more tokens than rows, padding
                included, the ids are looked at.
        """
        kwargs = with_one_name(kwargs)
        past_key_values = kwargs.pop("past_key_values", past_key_values)
        passes_the_limit = self.cache_limit is not None and input_ids.shape[1] > self.cache_limit
        if passes_the_limit and past_key_values and past_key_values.get_seq_length() <= self.cache_limit:
            past_key_values = None
            next_sequence_length = None
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **{CACHE: past_key_values},
            **kwargs,
        )
        # PEFT's prompts look for the cache by the name that it had first.
        inputs = with_one_name(inputs)
        length = (attention_mask if torch.is_tensor(attention_mask) else input_ids).shape[-1]
        position_ids = inputs.get("position_ids")
        if self.position_limit is not None and length > self.position_limit and position_ids is not None:
            last = int(position_ids.max())
            if last >= self.position_limit:
                raise too_long(f"Token {last + 1} has no row in a table of {self.position_limit} positions")
        return inputs

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict) -> torch.Tensor:
        if self.config.generation_counts_padding:
            model_kwargs = {**model_kwargs, "attention_mask": None}
        position_ids = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        # Beams repeat every row.
        return position_ids.expand(inputs_tensor.shape[0], -1)

    def __setattr__(self, name: str, value) -> None:
        # TRL replaces the method in the instance.
        super().__setattr__(name, guard_fused_head(self, value) if name == "forward" else value)

    def logits_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden_size) -> (batch, length, vocab_size)."""
        return self.finish_logits(self.lm_head(self.lm_head_transform(hidden_states)))

    def labels_in_place(self, labels: torch.Tensor, shift_labels: torch.Tensor | None = None) -> torch.Tensor:
        if shift_labels is not None:
            return shift_labels
        return F.pad(labels, (0, 1), value=-100)[..., 1:] if self.config.shift_labels else labels

    def init_continuous_batching(self, *args, **kwargs):
        self.model.refuse_continuous_batching()
        return super().init_continuous_batching(*args, **kwargs)

    @in_stock_order
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        token_type_ids: torch.LongTensor | None = None,
        task_type_ids: torch.LongTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """
        Args:
            labels: (batch, length), -100 where nothing is scored; shifted here (with `shift_labels`).
            logits_to_keep: compute logits for the last n positions only (0: all), or at these indices.
            The others: see `VariantModel`.

        Returns:
            `logits` (batch, kept length, vocab_size), the cache, and `loss` if there are labels; no logits in training
            with `loss_chunk`.
        """
        outputs = self.model(
            input_ids=input_ids,
            return_dict=True,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_type_ids=token_type_ids,
            task_type_ids=task_type_ids,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )
        hidden_states = slice_positions(outputs.last_hidden_state, logits_to_keep)
        if self.takes_loss_in_chunks(labels):
            logits, loss = None, self.chunked_loss(hidden_states, labels, **kwargs)
        else:
            logits, loss = self.logits_of(hidden_states), None
        if labels is not None and logits is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        elif labels is None and "num_items_in_batch" in kwargs:
            warn_of_lost_terms(self.config)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            # Empty where no layer has them.
            cross_attentions=outputs.cross_attentions or None,
        )


class VariantForMaskedLM(VariantPreTrainedModel):
    """A stack, usually an encoder, with a head that predicts masked tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    @staticmethod
    def parts(config: VariantConfig) -> dict[str, Any]:
        return {"model": Part(VariantModel, config=config, role="other"), **language_head_parts(config)}

    def __init__(self, config: VariantConfig):
        super().__init__(config)
        if config.is_causal:
            logger.warning_once(
                "`is_causal` is True, so a masked token is predicted from those before it alone. "
                "Use `VariantForCausalLM` for a decoder, or set `is_causal=False`, if that is not meant."
            )
        self.add_parts(self.parts(config))
        if (loss := build_loss(config, shifted=False)) is not None:
            self.loss_function = loss
        self.post_init()

    def logits_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden_size) -> (batch, length, vocab_size)."""
        return self.finish_logits(self.lm_head(self.lm_head_transform(hidden_states)))

    @in_stock_order
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        task_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, task_type_ids: see `VariantModel`.
            encoder_hidden_states, encoder_attention_mask: named as by the stock classes; an encoder has no use for them.
            labels: (batch, length), -100 where nothing is scored.

        Returns:
            `logits` (batch, length, vocab_size), and `loss` if there are labels.
        """
        outputs = self.model(
            input_ids=input_ids,
            return_dict=True,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            task_type_ids=task_type_ids,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )
        if self.takes_loss_in_chunks(labels):
            logits, loss = None, self.chunked_loss(outputs.last_hidden_state, labels, **kwargs)
        else:
            logits, loss = self.logits_of(outputs.last_hidden_state), None
        if labels is not None and logits is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        elif labels is None and "num_items_in_batch" in kwargs:
            warn_of_lost_terms(self.config)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@states(CALLS, VariantForCausalLM)
def calls_in_language_model(call: Call, name: str, config: VariantConfig) -> Call:
    return call if name == "model" or call.logits is None else call.of_length(call.logits)


def scores_tokens(pooling: str) -> bool:
    """Native decoders score every token and choose afterwards, which rounds as one large product."""
    return pooling in ("last", "mean_of_logits")


class SequenceScoring(VariantPreTrainedModel):
    """What scores whole sequences by one vector of each, which `pooling` says where there is no pooler."""

    # The mean over a batch, which the Trainer then divides by the number of batches that it accumulates.
    accepts_loss_kwargs = False

    def __init__(self, config: VariantConfig, pooling: str):
        super().__init__(config)
        self.add_parts(self.parts(config))
        self.pooling = pooling
        self.pool = build_pooling(pooling)
        self.post_init()

    def classify(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (..., classes)."""
        return self.score(self.dropout(self.pre_classifier(hidden_states)))

    def scores_of(
        self,
        outputs: ModelOutput,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the stack gives for these inputs -> (batch, classes)."""
        if self.model.pooler is not None:
            return self.classify(outputs.pooler_output)
        tokens = self.real_tokens(input_ids, inputs_embeds, attention_mask)
        hidden_states = outputs.last_hidden_state
        if scores_tokens(self.pooling):
            return self.pool(self.classify(hidden_states), tokens)
        return self.classify(self.pool(hidden_states, tokens))

    def real_tokens(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """
        (batch, length) with 1 at tokens that are not padding: by the mask or, for the last token, by `pad_token_id`
        where there is one, as transformers' own classifiers do; `None` for all tokens, where nothing tells.
        """
        if self.pooling == "end_of_sequence":
            return ends_of_sequences(input_ids, self.config.eos_token_id)
        by_id = self.pooling == "last" and self.config.pad_token_id is not None
        masked = torch.is_tensor(attention_mask) and attention_mask.ndim == 2
        if masked and not (by_id and input_ids is not None):
            return attention_mask.to(torch.int32)
        if self.pooling != "last":
            return None
        if input_ids is None:
            return torch.ones(inputs_embeds.shape[:2], dtype=torch.int32, device=inputs_embeds.device)
        if self.config.pad_token_id is None:
            if input_ids.shape[0] > 1:
                raise ValueError(
                    "`pad_token_id` is not set, so the last real token of a batch is unknown. "
                    "Set it in the config, or pass an `attention_mask`."
                )
            return torch.ones_like(input_ids, dtype=torch.int32)
        return input_ids.ne(self.config.pad_token_id).to(torch.int32)


class VariantForSequenceClassification(SequenceScoring):
    """A stack with a classifier on one vector per sequence (`classifier_pooling`)."""

    @staticmethod
    def parts(config: VariantConfig) -> dict[str, Any]:
        return {
            "model": Part(VariantModel, config=config, role="classifier"),
            **sequence_classifier_parts(config, config.num_labels),
        }

    def __init__(self, config: VariantConfig):
        super().__init__(config, config.classifier_pooling)
        self.num_labels = config.num_labels

    @in_stock_order
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        task_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """
        Args:
            labels: (batch,) of classes, (batch, num_labels) of several, or values for a regression.
            The others: see `VariantModel`.

        Returns:
            `logits` (batch, num_labels), and `loss` if there are labels.
        """
        refuse_packing(position_ids, attention_mask, "a row gets one class")
        outputs = self.model(
            input_ids=input_ids,
            return_dict=True,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_type_ids=token_type_ids,
            task_type_ids=task_type_ids,
            **kwargs,
        )
        logits = self.scores_of(outputs, input_ids, inputs_embeds, attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, logits=logits, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@states(CALLS, VariantForSequenceClassification)
def calls_in_sequence_classifier(call: Call, name: str, config: VariantConfig) -> Call:
    of_tokens = scores_tokens(config.classifier_pooling) and not config.has_pooler("classifier")
    return call if name == "model" or of_tokens else call.of_length(1)


class VariantForMultipleChoice(SequenceScoring):
    """A stack that scores every choice of a batch as a sequence of its own (`choice_pooling`)."""

    @staticmethod
    def parts(config: VariantConfig) -> dict[str, Any]:
        return {
            "model": Part(VariantModel, config=config, role="choices"),
            **choice_classifier_parts(config),
        }

    def __init__(self, config: VariantConfig):
        super().__init__(config, config.choice_pooling)

    @in_stock_order
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        task_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        """
        Args:
            labels: (batch,), the right choice of each.
            The others: as `VariantModel` takes them, (batch, choices, length).

        Returns:
            `logits` (batch, choices), and `loss` if there are labels.
        """
        num_choices = (input_ids if input_ids is not None else inputs_embeds).shape[1]
        tokens = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "token_type_ids": token_type_ids,
            "task_type_ids": task_type_ids,
        }
        # (batch, choices, length) -> (batch * choices, length)
        rows = {name: each if each is None else each.reshape(-1, each.shape[-1]) for name, each in tokens.items()}
        if inputs_embeds is not None:
            # (batch, choices, length, width) -> (batch * choices, length, width)
            inputs_embeds = inputs_embeds.flatten(0, 1)
        refuse_packing(rows["position_ids"], rows["attention_mask"], "a row gets one score")
        outputs = self.model(**rows, inputs_embeds=inputs_embeds, return_dict=True, **{"use_cache": False, **kwargs})
        logits = self.scores_of(outputs, rows["input_ids"], inputs_embeds, rows["attention_mask"])
        # (batch * choices, 1) -> (batch, choices)
        logits = logits.view(-1, num_choices)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels.to(logits.device))
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@states(CALLS, VariantForMultipleChoice)
def calls_in_multiple_choice(call: Call, name: str, config: VariantConfig) -> Call:
    of_tokens = scores_tokens(config.choice_pooling) and not config.has_pooler("choices")
    return call if name == "model" or of_tokens else call.of_length(1)


class VariantForNextSentencePrediction(SequenceScoring):
    """A stack that tells by one vector per sequence whether its second part follows the first (`classifier_pooling`)."""

    @staticmethod
    def parts(config: VariantConfig) -> dict[str, Any]:
        return {
            "model": Part(VariantModel, config=config, role="classifier"),
            **next_sentence_parts(config),
        }

    def __init__(self, config: VariantConfig):
        super().__init__(config, config.classifier_pooling)

    @in_stock_order
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        task_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> NextSentencePredictorOutput:
        """
        Args:
            labels: (batch,), 0 where the second part follows, 1 where it does not.
            The others: see `VariantModel`.

        Returns:
            `logits` (batch, 2), and `loss` if there are labels.
        """
        refuse_packing(position_ids, attention_mask, "a row gets one answer")
        outputs = self.model(
            input_ids=input_ids,
            return_dict=True,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            task_type_ids=task_type_ids,
            **{"use_cache": False, **kwargs},
        )
        logits = self.scores_of(outputs, input_ids, inputs_embeds, attention_mask)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels.view(-1).to(logits.device))
        return NextSentencePredictorOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


states(CALLS, VariantForNextSentencePrediction)(calls_in_sequence_classifier)


class VariantForTokenClassification(VariantPreTrainedModel):
    """A stack with a classifier on every token."""

    @staticmethod
    def parts(config: VariantConfig) -> dict[str, Any]:
        return {
            "model": Part(VariantModel, config=config, role="other"),
            **token_classifier_parts(config, config.num_labels),
        }

    def __init__(self, config: VariantConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.add_parts(self.parts(config))
        if (loss := build_token_classifier_loss(config)) is not None:
            self.loss_function = loss
        self.post_init()

    @in_stock_order
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        task_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """
        Args:
            labels: (batch, length), -100 where nothing is scored.
            The others: see `VariantModel`.

        Returns:
            `logits` (batch, length, num_labels), and `loss` if there are labels.
        """
        outputs = self.model(
            input_ids=input_ids,
            return_dict=True,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_type_ids=token_type_ids,
            task_type_ids=task_type_ids,
            **kwargs,
        )
        logits = self.score(self.dropout(self.pre_classifier(outputs.last_hidden_state)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=kwargs.get("num_items_in_batch"))
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class VariantForQuestionAnswering(VariantPreTrainedModel):
    """A stack with a span classifier: start and end logits for every token."""

    @staticmethod
    def parts(config: VariantConfig) -> dict[str, Any]:
        return {"model": Part(VariantModel, config=config, role="other"), **span_classifier_parts(config)}

    def __init__(self, config: VariantConfig):
        super().__init__(config)
        self.add_parts(self.parts(config))
        self.post_init()

    @in_stock_order
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        task_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """
        Args:
            start_positions, end_positions: (batch,), the span's first and last token.
            The others: see `VariantModel`.

        Returns:
            `start_logits` and `end_logits` (batch, length), and `loss` if both positions are given.
        """
        refuse_packing(position_ids, attention_mask, "a row gets one span")
        outputs = self.model(
            input_ids=input_ids,
            return_dict=True,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_type_ids=token_type_ids,
            task_type_ids=task_type_ids,
            **kwargs,
        )
        hidden_states = self.dropout(self.pre_classifier(outputs.last_hidden_state))
        # (batch, length, 2) -> two of (batch, length)
        start_logits, end_logits = (part.contiguous() for part in self.qa_outputs(hidden_states).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "VariantForCausalLM",
    "VariantForMaskedLM",
    "VariantForMultipleChoice",
    "VariantForNextSentencePrediction",
    "VariantForQuestionAnswering",
    "VariantForSequenceClassification",
    "VariantForTokenClassification",
    "VariantModel",
    "VariantPreTrainedModel",
]

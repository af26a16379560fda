"""The encoder-decoder: two `VariantModel` stacks with the heads that stand on the decoder."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput, can_return_tuple

from .arguments import CACHE, in_stock_order, with_one_name
from .builder import (
    build_loss,
    build_pooling,
    build_token_classifier_loss,
    language_head_parts,
    sequence_classifier_parts,
    span_classifier_parts,
    token_classifier_parts,
    token_embedding_part,
)
from .configuration_variant_seq2seq import VariantSeq2SeqConfig
from .heads import ends_of_sequences
from .losses import token_loss, warn_of_lost_terms
from .modeling_variant import (
    VariantModel,
    VariantPreTrainedModel,
    calls_in_language_model,
    calls_in_sequence_classifier,
    refuse_packing,
    slice_positions,
)
from .part import CALLS, Call, Part, states


class VariantSeq2SeqPreTrainedModel(VariantPreTrainedModel):
    """What the encoder-decoder models have in common."""

    config: VariantSeq2SeqConfig
    config_class = VariantSeq2SeqConfig
    # The stacks record their own outputs.
    _can_record_outputs = {}

    def shift_right(self, tokens: torch.LongTensor) -> torch.LongTensor:
        """
        Tokens as decoder inputs that predict them: behind a first token (`label_shift`), without the last.

        Args:
            tokens: (batch, length), -100 where nothing is scored, which becomes padding.
        """
        pad = self.config.pad_token_id
        if pad is None:
            raise ValueError("`pad_token_id` is not set, which stands for unscored labels. Set it in the config.")
        tokens = tokens.masked_fill(tokens == -100, pad)
        if self.config.label_shift == "last_token":
            last = (tokens.ne(pad).sum(dim=1) - 1).unsqueeze(-1)
            first = tokens.gather(1, last)
        else:
            if self.config.decoder_start_token_id is None:
                raise ValueError(
                    "`decoder_start_token_id` is not set, which decoder inputs begin with. Set it in the config, or "
                    "pass `decoder_input_ids`."
                )
            first = torch.full_like(tokens[:, :1], self.config.decoder_start_token_id)
        return torch.cat([first, tokens[:, :-1]], dim=1)

    @property
    def _stacks(self) -> "VariantSeq2SeqModel":
        return getattr(self, self.base_model_prefix, self)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """
        As in transformers. Where the stacks have vocabularies of their own (none of `share_embeddings`,
        `unread_shared_embedding` and `one_vocabulary`), the encoder's; see `resize_decoder_token_embeddings`.
        """
        sizes = (new_num_tokens, pad_to_multiple_of, mean_resizing)
        if not self.config.share_embeddings:
            embeddings = self._stacks.encoder.resize_token_embeddings(*sizes)
            self.config.encoder.vocab_size = embeddings.weight.shape[0]
            if self.config.unread_shared_embedding:
                self._get_resized_embeddings(self._stacks.unread_embedding, *sizes)
            if self.config.unread_shared_embedding or self.config.one_vocabulary:
                self._resize_decoder(*sizes)
            return embeddings
        embeddings = super().resize_token_embeddings(*sizes)
        self._follow_decoder(embeddings.weight.shape[0])
        self.config.encoder.vocab_size = embeddings.weight.shape[0]
        return embeddings

    def resize_decoder_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """
        As in Marian: the decoder's own vocabulary, with the head and its bias.

        Raises:
            ValueError: if there is one vocabulary for both stacks.
        """
        config = self.config
        if config.share_embeddings or config.unread_shared_embedding or config.one_vocabulary:
            raise ValueError(
                "`resize_decoder_token_embeddings` resizes a vocabulary of the decoder's own, and the stacks share one "
                "(`share_embeddings`, `unread_shared_embedding` or `one_vocabulary`). Call `resize_token_embeddings`."
            )
        return self._resize_decoder(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def _resize_decoder(
        self, new_num_tokens: int | None, pad_to_multiple_of: int | None, mean_resizing: bool
    ) -> nn.Embedding:
        embeddings = self._stacks.decoder.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size = embeddings.weight.shape[0]
        if (head := self.get_output_embeddings()) is not None:
            self._get_resized_lm_head(head, size, mean_resizing=mean_resizing)
        self._follow_decoder(size)
        self.tie_weights()
        return embeddings

    def _follow_decoder(self, size: int) -> None:
        """What else has one entry per token of the decoder."""
        self.vocab_size = self.config.vocab_size = self.config.decoder.vocab_size = size
        if (bias := getattr(self, "final_logits_bias", None)) is not None:
            grown = bias.new_zeros(1, size)
            kept = min(size, bias.shape[1])
            grown[:, :kept] = bias[:, :kept]
            self.final_logits_bias = grown


class VariantSeq2SeqModel(VariantSeq2SeqPreTrainedModel):
    """Encoder and decoder without a head."""

    _tied_weights_keys = {"encoder.embed_tokens.weight": "decoder.embed_tokens.weight"}

    @staticmethod
    def parts(config: VariantSeq2SeqConfig) -> dict[str, Any]:
        stacks = {name: Part(VariantModel, config=getattr(config, name)) for name in ("encoder", "decoder")}
        if not config.unread_shared_embedding:
            return stacks
        return {**stacks, "unread_embedding": token_embedding_part(config.decoder)}

    def __init__(self, config: VariantSeq2SeqConfig):
        super().__init__(config)
        self.add_parts(self.parts(config))
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # transformers knows one flag for all ties; here the embeddings may be shared without tying the head.
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return dict(self._tied_weights_keys) if self.config.share_embeddings else {}

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = value
        if self.config.share_embeddings:
            # The table alone: who multiplies its rows, and by what, is each stack's own (Marian, MVP).
            self.decoder.embed_tokens.weight = value.weight
            self.decoder.embed_tokens.num_embeddings = value.weight.shape[0]

    @in_stock_order
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | dict | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        decoder_token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        """
        Args:
            input_ids, attention_mask, position_ids, token_type_ids, inputs_embeds: of the encoder, (batch, source length).
            decoder_input_ids, decoder_attention_mask, decoder_position_ids, decoder_token_type_ids,
                decoder_inputs_embeds: of the decoder, (batch, target length); see `VariantModel`. Position ids of packed
                documents are refused. Absent decoder inputs are made of `input_ids` with `decoder_inputs_from_source`.
            encoder_outputs: what the encoder returned earlier, to be used again.
            past_key_values: an `EncoderDecoderCache`, updated in place.

        Returns:
            `last_hidden_state` (batch, target length, width), the cache and the encoder's outputs.
        """
        refuse_packing(position_ids, attention_mask, "cross-attention does not tell them apart")
        # What the config of the whole asks for, those of the stacks do not.
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name) is None and getattr(self.config, name):
                kwargs[name] = True
        if use_cache is None and not self.config.use_cache:
            use_cache = False
        if self.config.decoder_inputs_from_source and decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None:
                raise ValueError(
                    "`decoder_input_ids` and `decoder_inputs_embeds` are missing, and `input_ids`, which they would be made "
                    "of, as well. Pass one of the three."
                )
            decoder_input_ids = self.shift_right(input_ids)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError(
                "`decoder_input_ids` and `decoder_inputs_embeds` are both missing. Pass one of them, or labels to a model "
                "that takes those; the encoder alone is `get_encoder()`, and a checkpoint of it what "
                "`hf-variants edit --encoder-alone` makes."
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                token_type_ids=token_type_ids,
                inputs_embeds=inputs_embeds,
                return_dict=True,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            token_type_ids=decoder_token_type_ids,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            **{CACHE: decoder_outputs.get(CACHE)},
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


@states(CALLS, VariantSeq2SeqModel)
def calls_in_two_stacks(call: Call, name: str, config: VariantSeq2SeqConfig) -> Call:
    return call if name == "decoder" else call.of_length(0 if call.source_is_cached else call.source)


class VariantForConditionalGeneration(VariantSeq2SeqPreTrainedModel, GenerationMixin):
    """An encoder-decoder with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    @staticmethod
    def parts(config: VariantSeq2SeqConfig) -> dict[str, Any]:
        return {"model": Part(VariantSeq2SeqModel, config=config), **language_head_parts(config.decoder)}

    def __init__(self, config: VariantSeq2SeqConfig):
        super().__init__(config)
        self.add_parts(self.parts(config))
        if config.final_logits_bias:
            self.register_buffer("final_logits_bias", torch.zeros(1, config.decoder.vocab_size))
        # Labels stand at the position they are predicted from: transformers' default would shift them once more.
        self.loss_function = build_loss(config.decoder, shifted=False) or token_loss
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.final_logits_bias:
            nn.init.zeros_(self.final_logits_bias)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return dict(self._tied_weights_keys) if self.config.tie_word_embeddings else {}

    def finish_logits(self, logits: torch.Tensor) -> torch.Tensor:
        logits = self.logit_scaling(logits)
        return logits + self.final_logits_bias if self.config.final_logits_bias else logits

    def logits_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden_size) -> (batch, length, vocab_size)."""
        return self.finish_logits(self.lm_head(self.lm_head_transform(hidden_states)))

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """
        Decoder inputs for labels: shifted right by one, with padding where nothing is scored.

        Args:
            labels: (batch, target length), -100 where nothing is scored.
        """
        return self.shift_right(labels)

    @in_stock_order
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | dict | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        position_ids: torch.LongTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        decoder_token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """
        Args:
            labels: (batch, target length), -100 where nothing is scored; the decoder's inputs are made from them
                where they are absent.
            logits_to_keep: compute logits for the last n positions only (0: all), or at these indices.
            The others: see `VariantSeq2SeqModel`.

        Returns:
            `logits` (batch, kept length, vocab_size), the cache, the encoder's outputs, and `loss` if there are labels.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if labels is not None and self.config.labels_disable_cache:
            use_cache = False
        # The loss's own argument; the stacks would hand it down to the attention.
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            position_ids=position_ids,
            decoder_position_ids=decoder_position_ids,
            token_type_ids=token_type_ids,
            decoder_token_type_ids=decoder_token_type_ids,
            return_dict=True,
            **kwargs,
        )
        hidden_states = slice_positions(outputs.last_hidden_state, logits_to_keep)
        if self.takes_loss_in_chunks(labels):
            logits, loss = None, self.chunked_loss(hidden_states, labels, num_items_in_batch=num_items_in_batch)
        else:
            logits, loss = self.logits_of(hidden_states), None
        if labels is not None and logits is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
            )
        elif labels is None and num_items_in_batch is not None:
            warn_of_lost_terms(self.config.decoder)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        # PEFT's prompts look for the cache by the name that it had first.
        return with_one_name(super().prepare_inputs_for_generation(*args, **kwargs))

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int
    ) -> None:
        # The default builds the cross-attention half from the decoder's layer types, and a sliding layer would forget
        # the beginning of the source.
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get(CACHE)
        if not isinstance(cache, EncoderDecoderCache) or any(cache.is_updated.values()):
            return
        decoder = copy.deepcopy(self.config.decoder)
        decoder.layer_types = ["full_attention"] * decoder.num_hidden_layers
        decoder.sliding_window = None
        if isinstance(cache.cross_attention_cache, StaticCache):
            source_length = model_kwargs["encoder_outputs"][0].shape[1]
            cross = StaticCache(config=decoder, max_cache_len=source_length)
        else:
            offloading = "offloaded" in (generation_config.cache_implementation or "")
            cross = DynamicCache(config=decoder, offloading=offloading)
        cache.cross_attention_cache = cross


states(CALLS, VariantForConditionalGeneration)(calls_in_language_model)


def of_both_stacks(outputs: Seq2SeqModelOutput) -> dict:
    """What the output of a head has of the model inside it."""
    return {name: value for name, value in outputs.items() if name != "last_hidden_state"}


class VariantSeq2SeqClassifier(VariantSeq2SeqPreTrainedModel):
    """What the classifiers have in common: decoder inputs that are absent are the source's tokens, shifted."""

    def decoder_states(
        self,
        input_ids: torch.LongTensor | None,
        decoder_input_ids: torch.LongTensor | None,
        decoder_inputs_embeds: torch.FloatTensor | None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        """
        Args:
            input_ids: (batch, source length).
            decoder_input_ids, decoder_inputs_embeds: (batch, target length); at most one of them.
            kwargs: of `VariantSeq2SeqModel`.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None:
                raise ValueError(
                    "`decoder_input_ids` and `decoder_inputs_embeds` are missing, and `input_ids`, which they would be made "
                    "of, as well. Pass one of the three."
                )
            decoder_input_ids = self.shift_right(input_ids)
        return self.model(
            input_ids=input_ids,
            decoder_input_ids=decoder_input_ids,
            decoder_inputs_embeds=decoder_inputs_embeds,
            return_dict=True,
            **kwargs,
        )


class VariantSeq2SeqForSequenceClassification(VariantSeq2SeqClassifier):
    """An encoder-decoder with a classifier on one vector of the decoder (its `classifier_pooling`)."""

    # The mean over a batch, which the Trainer then divides by the number of batches that it accumulates.
    accepts_loss_kwargs = False

    @staticmethod
    def parts(config: VariantSeq2SeqConfig) -> dict[str, Any]:
        return {
            "model": Part(VariantSeq2SeqModel, config=config),
            **sequence_classifier_parts(config.decoder, config.num_labels),
        }

    def __init__(self, config: VariantSeq2SeqConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.add_parts(self.parts(config))
        self.pool = build_pooling(config.decoder.classifier_pooling)
        # The native classes that do so make no cache, either.
        self.scores_tokens = config.decoder.classifier_pooling in ("last", "mean_of_logits")
        self.post_init()

    def classify(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (..., num_labels)."""
        return self.score(self.dropout(self.pre_classifier(hidden_states)))

    def marked_tokens(
        self, input_ids: torch.Tensor | None, decoder_attention_mask: torch.Tensor | dict | None, length: int
    ) -> torch.Tensor | None:
        """
        (batch, `length`) with 1 where the decoder's states are of interest; `None` for all of them.

        Args:
            input_ids: (batch, source length).
            decoder_attention_mask: as in `forward`.
            length: of the decoder's inputs.
        """
        kind, pad = self.config.decoder.classifier_pooling, self.config.pad_token_id
        if kind == "end_of_sequence":
            ends = ends_of_sequences(input_ids, self.config.eos_token_id)
            if ends.shape[1] != length:
                raise ValueError(
                    f"`input_ids` have {ends.shape[1]} tokens and the decoder's inputs {length}, so the end of the source "
                    "is not a place in the decoder. Give them the same length, or leave the decoder's inputs out."
                )
            return ends
        if kind != "last":
            is_mask = torch.is_tensor(decoder_attention_mask) and decoder_attention_mask.ndim == 2
            return decoder_attention_mask.to(torch.int32) if is_mask else None
        if input_ids is None:
            raise ValueError(
                "`classifier_pooling` is last, and the last real token is looked for in `input_ids`, which are missing. "
                "Pass them."
            )
        places = torch.arange(length, device=input_ids.device).expand(input_ids.shape[0], -1)
        if pad is None:
            if input_ids.shape[0] > 1:
                raise ValueError(
                    "`pad_token_id` is not set, so the last real token of a batch is unknown. Set it in the config."
                )
            return torch.ones_like(places)
        source = torch.arange(input_ids.shape[1], device=input_ids.device)
        # One further, as the decoder's inputs are shifted.
        last = ((source * input_ids.ne(pad)).argmax(dim=-1) + 1).clamp(max=length - 1)
        return (places == last[:, None]).to(torch.int32)

    @in_stock_order
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | dict | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        decoder_token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> Seq2SeqSequenceClassifierOutput:
        """
        Args:
            labels: (batch,) of classes, (batch, num_labels) of several, or values for a regression.
            The others: see `VariantSeq2SeqModel`; decoder inputs that are absent are made of `input_ids`.

        Returns:
            `logits` (batch, num_labels), the cache, the encoder's outputs, and `loss` if there are labels.
        """
        outputs = self.decoder_states(
            input_ids,
            decoder_input_ids,
            decoder_inputs_embeds,
            attention_mask=attention_mask,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            inputs_embeds=inputs_embeds,
            use_cache=False if labels is not None or self.scores_tokens else use_cache,
            position_ids=position_ids,
            decoder_position_ids=decoder_position_ids,
            token_type_ids=token_type_ids,
            decoder_token_type_ids=decoder_token_type_ids,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        tokens = self.marked_tokens(input_ids, decoder_attention_mask, hidden_states.shape[1])
        if self.scores_tokens:
            logits = self.pool(self.classify(hidden_states), tokens)
        else:
            logits = self.classify(self.pool(hidden_states, tokens))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, logits=logits, pooled_logits=logits, config=self.config)
        return Seq2SeqSequenceClassifierOutput(loss=loss, logits=logits, **of_both_stacks(outputs))


@states(CALLS, VariantSeq2SeqForSequenceClassification)
def calls_in_classifier_of_decoder(call: Call, name: str, config: VariantSeq2SeqConfig) -> Call:
    return call if name == "model" else calls_in_sequence_classifier(call, name, config.decoder)


class VariantSeq2SeqForTokenClassification(VariantSeq2SeqClassifier):
    """An encoder-decoder with a classifier on every token of the decoder."""

    @staticmethod
    def parts(config: VariantSeq2SeqConfig) -> dict[str, Any]:
        return {
            "model": Part(VariantSeq2SeqModel, config=config),
            **token_classifier_parts(config.decoder, config.num_labels),
        }

    def __init__(self, config: VariantSeq2SeqConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.add_parts(self.parts(config))
        if (loss := build_token_classifier_loss(config.decoder)) is not None:
            self.loss_function = loss
        self.post_init()

    @in_stock_order
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | dict | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        decoder_token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """
        Args:
            labels: (batch, target length), -100 where nothing is scored.
            The others: see `VariantSeq2SeqModel`; decoder inputs that are absent are made of `input_ids`.

        Returns:
            `logits` (batch, target length, num_labels), the decoder's states and attentions on request, and `loss` if
            there are labels.
        """
        kwargs.pop("use_cache", None)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.decoder_states(
            input_ids,
            decoder_input_ids,
            decoder_inputs_embeds,
            attention_mask=attention_mask,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            position_ids=position_ids,
            decoder_position_ids=decoder_position_ids,
            token_type_ids=token_type_ids,
            decoder_token_type_ids=decoder_token_type_ids,
            **kwargs,
        )
        logits = self.score(self.dropout(self.pre_classifier(outputs.last_hidden_state)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.decoder_hidden_states,
            attentions=outputs.decoder_attentions,
        )


class VariantSeq2SeqForQuestionAnswering(VariantSeq2SeqClassifier):
    """An encoder-decoder with a span classifier: start and end logits for every token of the decoder."""

    @staticmethod
    def parts(config: VariantSeq2SeqConfig) -> dict[str, Any]:
        return {"model": Part(VariantSeq2SeqModel, config=config), **span_classifier_parts(config.decoder)}

    def __init__(self, config: VariantSeq2SeqConfig):
        super().__init__(config)
        self.add_parts(self.parts(config))
        self.post_init()

    @in_stock_order
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | dict | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        decoder_token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> Seq2SeqQuestionAnsweringModelOutput:
        """
        Args:
            start_positions, end_positions: (batch,), the span's first and last token.
            The others: see `VariantSeq2SeqModel`; decoder inputs that are absent are made of `input_ids`.

        Returns:
            `start_logits` and `end_logits` (batch, target length), the cache, the encoder's outputs, and `loss` if both
            positions are given.
        """
        is_scored = start_positions is not None and end_positions is not None
        outputs = self.decoder_states(
            input_ids,
            decoder_input_ids,
            decoder_inputs_embeds,
            attention_mask=attention_mask,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            inputs_embeds=inputs_embeds,
            use_cache=False if is_scored else use_cache,
            position_ids=position_ids,
            decoder_position_ids=decoder_position_ids,
            token_type_ids=token_type_ids,
            decoder_token_type_ids=decoder_token_type_ids,
            **kwargs,
        )
        hidden_states = self.dropout(self.pre_classifier(outputs.last_hidden_state))
        # (batch, length, 2) -> two of (batch, length)
        start_logits, end_logits = (part.contiguous() for part in self.qa_outputs(hidden_states).unbind(-1))
        loss = None
        if is_scored:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return Seq2SeqQuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, **of_both_stacks(outputs)
        )


__all__ = [
    "VariantForConditionalGeneration",
    "VariantSeq2SeqForQuestionAnswering",
    "VariantSeq2SeqForSequenceClassification",
    "VariantSeq2SeqForTokenClassification",
    "VariantSeq2SeqModel",
    "VariantSeq2SeqPreTrainedModel",
]

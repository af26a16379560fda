"""Which graphs stand for a model: what goes in and comes out, under the names that ONNX runtimes' users know."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from ....model.configuration_variant import VariantConfig


# As optimum's models for onnxruntime call the files, the dimensions and the tensors
# (https://huggingface.co/docs/optimum-onnx).
MODEL, ENCODER, DECODER, WITH_PAST = (
    "model.onnx", "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx",
)  # fmt: skip
BATCH, LENGTH, PAST, SOURCE = "batch_size", "sequence_length", "past_sequence_length", "encoder_sequence_length"
TARGET = "decoder_sequence_length"
TOTAL = f"{PAST} + {LENGTH}"
# Of what a graph is traced with: all different, and none of them 0 or 1, which tracing takes for constants.
EXAMPLE = {BATCH: 2, LENGTH: 5, PAST: 3, SOURCE: 7, TOTAL: 8, TARGET: 6}

Shape = tuple[str | int, ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor that goes in or comes out: its name and shape, whose dimensions are sizes or names."""

    name: str
    shape: Shape

    def example(self) -> torch.Tensor:
        """Zeros of activations; of ids and masks, ones."""
        shape = [EXAMPLE.get(dim, dim) for dim in self.shape]
        if len(shape) > 2:
            return torch.zeros(shape)
        return torch.ones(shape, dtype=torch.long)


@dataclass(frozen=True)
class Graph:
    """
    One file.

    Attributes:
        file: its name.
        run: of the inputs, in order, the outputs in order.
        model: whose weights it has.
        inputs, outputs: the outputs are all that `run` returns.
    """

    file: str
    run: Callable[..., tuple[torch.Tensor, ...]]
    model: PreTrainedModel
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


IDS = Tensor("input_ids", (BATCH, LENGTH))
MASK = Tensor("attention_mask", (BATCH, LENGTH))
TYPES = Tensor("token_type_ids", (BATCH, LENGTH))
POSITIONS = Tensor("position_ids", (BATCH, LENGTH))
WHOLE_MASK = Tensor("attention_mask", (BATCH, TOTAL))
SOURCE_MASK = Tensor("encoder_attention_mask", (BATCH, SOURCE))


def graphs_of(model: PreTrainedModel) -> list[Graph]:
    """
    The graphs of a model of ours.

    A decoder with a head is one graph, which takes and gives the keys and values of every layer; the first call has a
    past of length 0. An encoder-decoder with a head is three: the encoder, the decoder's first call, which projects the
    source, and its further calls. Any other model is one graph without a past.
    """
    config = model.config
    if not model.can_generate():
        return [_whole(model)]
    if config.is_encoder_decoder:
        return [_encoder(model), _first_call(model), _further_calls(model)]
    return [_decoder(model)]


def takes_types(config: Any) -> bool:
    """Whether token types are an input: of encoders, as decoders of language models are called without."""
    return not config.is_encoder_decoder and not config.is_causal and config.type_vocab_size > 0


# Without a past


def _whole(model: PreTrainedModel) -> Graph:
    config = model.config
    inputs = (IDS, MASK, TYPES) if takes_types(config) else (IDS, MASK)
    if config.is_encoder_decoder and type(model).__name__ == "VariantSeq2SeqModel":
        inputs = (*inputs, Tensor("decoder_input_ids", (BATCH, TARGET)))
    outputs = _outputs(model)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip((each.name for each in inputs), tensors))
        made = model(**named, use_cache=False)
        return tuple(made[each.name] for each in outputs)

    return Graph(MODEL, run, model, inputs, outputs)


def _outputs(model: PreTrainedModel) -> tuple[Tensor, ...]:
    """What a model without a past returns, in the order and under the names of its own output."""
    config = model.config
    decoder = config.decoder if config.is_encoder_decoder else config
    length = TARGET if type(model).__name__ == "VariantSeq2SeqModel" else LENGTH
    name = type(model).__name__
    if name.endswith("ForQuestionAnswering"):
        return tuple(Tensor(each, (BATCH, length)) for each in ("start_logits", "end_logits"))
    if name.endswith("ForSequenceClassification"):
        return (Tensor("logits", (BATCH, config.num_labels)),)
    if name.endswith("ForNextSentencePrediction"):
        return (Tensor("logits", (BATCH, 2)),)
    if name.endswith("ForTokenClassification"):
        return (Tensor("logits", (BATCH, length, config.num_labels)),)
    if name.endswith("ForMaskedLM"):
        return (Tensor("logits", (BATCH, length, config.vocab_size)),)
    states = Tensor("last_hidden_state", (BATCH, length, decoder.hidden_size))
    if getattr(model, "pooler", None) is None:
        return (states,)
    return states, Tensor("pooler_output", (BATCH, decoder.hidden_size))


# One stack with a past


def _keys_and_values(config: VariantConfig, form: str, length: str, half: str = "") -> tuple[Tensor, ...]:
    """By `form`, such as past_key_values, the keys and values of every layer, (batch, key/value heads, length, width)."""
    half = f".{half}" if half else ""
    layers = config.per_layer_config
    return tuple(
        Tensor(
            f"{form}.{index}{half}.{name}", (BATCH, layers[index].num_key_value_heads, length, layers[index].head_dim)
        )
        for index in _attending(config)
        for name in ("key", "value")
    )


def _attending(config: VariantConfig) -> list[int]:
    """The layers that have keys and values, of which the first is one."""
    return [
        index for index, layer in enumerate(config.per_layer_config) if "self_attn" not in getattr(layer, "skip", ())
    ]


def cache_of(tensors: list[torch.Tensor], config: VariantConfig) -> DynamicCache:
    """A cache that holds keys and values, given in turns; layers keep all of them, and masks make the windows."""
    cache = DynamicCache()
    cache.layers = [DynamicLayer() for _ in range(config.num_hidden_layers)]
    for index, keys, values in zip(_attending(config), tensors[::2], tensors[1::2]):
        layer = cache.layers[index]
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    return cache


def _held(cache: DynamicCache) -> Iterator[torch.Tensor]:
    for layer in cache.layers:
        if layer.is_initialized:
            yield layer.keys
            yield layer.values


def _decoder(model: PreTrainedModel) -> Graph:
    past = _keys_and_values(model.config, "past_key_values", PAST)
    present = _keys_and_values(model.config, "present", TOTAL)

    def run(input_ids, attention_mask, position_ids, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = cache_of(list(past), model.config)
        made = model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        return made.logits, *_held(cache)

    logits = Tensor("logits", (BATCH, LENGTH, model.config.vocab_size))
    return Graph(MODEL, run, model, (IDS, WHOLE_MASK, POSITIONS, *past), (logits, *present))


# Two stacks


def _encoder(model: PreTrainedModel) -> Graph:
    stack = model.model.encoder

    def run(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (stack(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state,)

    states = Tensor("last_hidden_state", (BATCH, LENGTH, stack.config.hidden_size))
    return Graph(ENCODER, run, model, (IDS, MASK), (states,))


def _logits(model: PreTrainedModel) -> Tensor:
    return Tensor("logits", (BATCH, LENGTH, model.config.decoder.vocab_size))


def _first_call(model: PreTrainedModel) -> Graph:
    encoder, decoder = model.config.encoder, model.config.decoder
    states = Tensor("encoder_hidden_states", (BATCH, SOURCE, encoder.hidden_size))

    def run(input_ids, encoder_attention_mask, encoder_hidden_states) -> tuple[torch.Tensor, ...]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        made = model(
            decoder_input_ids=input_ids, attention_mask=encoder_attention_mask,
            encoder_outputs=(encoder_hidden_states,), past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return made.logits, *_halves(cache)

    present = _interleaved(
        _keys_and_values(decoder, "present", LENGTH, "decoder"),
        _keys_and_values(decoder, "present", SOURCE, "encoder"),
    )
    return Graph(DECODER, run, model, (IDS, SOURCE_MASK, states), (_logits(model), *present))


def _further_calls(model: PreTrainedModel) -> Graph:
    decoder = model.config.decoder
    past = _interleaved(
        _keys_and_values(decoder, "past_key_values", PAST, "decoder"),
        _keys_and_values(decoder, "past_key_values", SOURCE, "encoder"),
    )

    def run(input_ids, encoder_attention_mask, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layers = [past[start : start + 4] for start in range(0, len(past), 4)]
        own = cache_of([tensor for layer in layers for tensor in layer[:2]], decoder)
        source = cache_of([tensor for layer in layers for tensor in layer[2:]], decoder)
        # Nothing reads them but for their shape, which the mask gets.
        keys = source.layers[0].keys
        states = keys.new_zeros(keys.shape[0], keys.shape[2], model.config.encoder.hidden_size)
        made = model(
            decoder_input_ids=input_ids, attention_mask=encoder_attention_mask, encoder_outputs=(states,),
            past_key_values=EncoderDecoderCache(own, source), use_cache=True,
        )  # fmt: skip
        return made.logits, *_held(own)

    present = _keys_and_values(decoder, "present", TOTAL, "decoder")
    return Graph(WITH_PAST, run, model, (IDS, SOURCE_MASK, *past), (_logits(model), *present))


def _interleaved(own: tuple[Tensor, ...], source: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of every layer the decoder's two, and the two of the source."""
    return tuple(
        tensor for start in range(0, len(own), 2) for tensor in (*own[start : start + 2], *source[start : start + 2])
    )


def _halves(cache: EncoderDecoderCache) -> Iterator[torch.Tensor]:
    for own, source in zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers):
        yield from (own.keys, own.values, source.keys, source.values)

"""One decoding step of a whole model, and the switch that has `generate` take it."""

import inspect
import weakref
from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, Seq2SeqLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_tracing

from ..model.arguments import CACHE, with_one_name
from ..model.attention import self_attention_half
from ..model.modeling_variant import VariantForCausalLM, VariantModel
from ..model.modeling_variant_seq2seq import VariantForConditionalGeneration
from ..model.normalization import unchanged
from .caches import can_hold, make_roomy
from .parts import Parts, Token, make_turn
from .watch import Watch, has_global_hooks, is_untouched


# Rows above which a step is the plain one.
MOST_SEQUENCES = 32
SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]


class StackStep:
    """
    One new token per row through a decoder's stack.

    Args:
        stack (`VariantModel`): the decoder.
        parts (`Parts`): makes the functions of its modules.

    Raises:
        NotImplementedError: if a block, or the stack itself, is not as built here.
    """

    def __init__(self, stack: VariantModel, parts: Parts):
        if type(stack) is not VariantModel or not is_untouched(stack):
            raise NotImplementedError("The stack was replaced or has a hook.")
        self.stack = stack
        layers = list(stack.layers)[: stack.config.num_hidden_layers]
        self.layer_types = stack.layer_types[: len(layers)]
        self.blocks = [parts.block(layer, stack.rotary_names[i]) for i, layer in enumerate(layers)]
        self.norm = parts.norm(stack.norm)
        parts.drops(stack.final_dropout)
        parts.drops(stack.embedding_dropout)
        self.project = unchanged if stack.output_projection is unchanged else parts.linear(stack.output_projection)
        # Rotary tables by name, with the head size of the layers that use them.
        self.tables = {
            stack.rotary_names[i]: layer.self_attn.head_dim
            for i, layer in enumerate(layers)
            if stack.rotary_names[i] is not None and hasattr(layer, "self_attn")
        }
        self.sliding = [i for i, kind in enumerate(self.layer_types) if kind == "sliding_attention"]
        self.last_source_mask: tuple | None = None

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache,
        token_type_ids: torch.Tensor | None = None,
        task_type_ids: torch.Tensor | None = None,
        encoder_states: torch.Tensor | None = None,
        encoder_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(rows, 1) token ids -> (rows, width); the cache grows by one. The others: see `VariantModel.forward`."""
        stack = self.stack
        own_cache = self_attention_half(cache)
        inputs_embeds = stack.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = stack.position_ids_of(input_ids, inputs_embeds, attention_mask, cache.get_seq_length())
        hidden_states = stack.embed(inputs_embeds, position_ids, token_type_ids, task_type_ids)
        biases = stack.position_bias(hidden_states, own_cache, attention_mask, stack.layer_types)
        masks = self.masks(attention_mask, inputs_embeds, own_cache, position_ids)
        tables = {name: table(hidden_states, position_ids) for name, table in stack.rotary_emb.items()}
        token = Token(
            layers=own_cache.layers,
            rotations={
                name: (
                    make_turn(*tables[name][:2], stack.rotary_emb[name].interleaved, head_dim),
                    tables[name][2].squeeze(1) if len(tables[name]) > 2 else None,
                )
                for name, head_dim in self.tables.items()
            },
            score_bias=self.score_bias(biases, masks),
            attends_to_source=encoder_states is not None,
        )

        def arguments(layer_idx: int) -> dict:
            return {
                "position_embeddings": tables.get(stack.rotary_names[layer_idx]),
                "attention_mask": masks[self.layer_types[layer_idx]],
                "position_bias": biases[layer_idx],
                "past_key_values": cache,
                "position_ids": position_ids,
            }

        token.arguments = arguments
        if encoder_states is not None:
            token.source_layers = cache.cross_attention_cache.layers
            token.source_bias = self.source_mask(inputs_embeds, encoder_states, encoder_mask)
            token.source_arguments = {
                "encoder_hidden_states": encoder_states,
                "encoder_attention_mask": token.source_bias,
                "past_key_values": cache,
            }
        # (rows, 1, width) -> (rows, width)
        hidden_states = hidden_states.squeeze(1)
        for block in self.blocks:
            hidden_states = block(hidden_states, token)
        return self.project(self.norm(hidden_states))

    def masks(
        self,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        cache: Cache,
        position_ids: torch.Tensor,
    ) -> dict[str, torch.Tensor | None]:
        """The masks of the stack; `None` for each where one new token sees all that its cache holds."""
        layers = cache.layers
        windows_forget = all(layers[i].is_sliding for i in self.sliding if i < len(layers))
        if windows_forget and (attention_mask is None or bool(attention_mask.all())):
            return dict.fromkeys(self.layer_types)
        return self.stack.create_masks(attention_mask, inputs_embeds, cache, position_ids)

    def score_bias(self, biases: list, masks: dict) -> list[torch.Tensor | None]:
        """Mask and position bias of every layer as one tensor."""
        sums: dict = {}
        result = []
        for bias, kind in zip(biases, self.layer_types, strict=False):
            mask = masks[kind]
            if bias is None or mask is None:
                result.append(mask if bias is None else bias)
                continue
            key = (id(bias), kind)
            if key not in sums:
                masked = mask.dtype == torch.bool
                sums[key] = bias.masked_fill(~mask, float("-inf")) if masked else bias + mask
            result.append(sums[key])
        return result

    def source_mask(
        self, inputs_embeds: torch.Tensor, encoder_states: torch.Tensor, encoder_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The mask of cross-attention, made anew where the encoder's mask is another than in the last step."""
        if encoder_mask is None or (encoder_mask.ndim == 2 and bool(encoder_mask.all())):
            return None
        key = (encoder_mask._version, inputs_embeds.shape[0], self.stack.config._attn_implementation)
        last = self.last_source_mask
        if last is None or last[0] is not encoder_mask or last[1] != key:
            mask = create_bidirectional_mask(
                config=self.stack.config,
                inputs_embeds=inputs_embeds,
                attention_mask=encoder_mask,
                encoder_hidden_states=encoder_states,
            )
            last = self.last_source_mask = (encoder_mask, key, mask)
        return last[2]


class Step:
    """
    One new token per row through a whole model: stack, transform, head.

    Raises:
        NotImplementedError: see `StackStep`.
    """

    def __init__(self, model: VariantForCausalLM | VariantForConditionalGeneration, stack: VariantModel):
        dtypes = {p.dtype for p in stack.parameters() if p.is_floating_point()}
        if dtypes != {torch.float32}:
            raise NotImplementedError("Not all weights are in float32.")
        parts = Parts()
        self.stack = StackStep(stack, parts)
        self.transform = model.lm_head_transform
        self.head = parts.linear(model.lm_head)
        self.scale = model.logit_scaling
        if any(module.training for module in parts.passed_by):
            raise NotImplementedError("A module is in training mode.")
        holders = [stack, stack.layers, *([model.model] if model.model is not stack else [])]
        # A model's own hooks run all the same.
        self.children = (model._modules, dict(model._modules))
        self.threads = torch.get_num_threads()
        self.watch = Watch(parts.passed_by, holders)
        self.called = parts.called

    def agrees(self, thoroughly: bool) -> bool:
        """Whether the modules are what they were."""
        return (
            self.children[0] == self.children[1]
            and self.watch.agrees(thoroughly)
            and (not thoroughly or self.threads == torch.get_num_threads())
        )

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        """The stack's arguments -> logits (rows, 1, vocab_size)."""
        hidden_states = self.transform(self.stack(*args, **kwargs).unsqueeze(1))
        return self.scale(self.head(hidden_states.squeeze(1)).unsqueeze(1))


class AcceleratedForward:
    """
    Stands in the place of a model's `forward`: decoding steps go the fast way, all other calls the plain one.

    Args:
        model: a decoder or an encoder-decoder with its language-modelling head.
    """

    def __init__(self, model: VariantForCausalLM | VariantForConditionalGeneration):
        self.model = model
        # `generate` and the Trainer look at it.
        self.__signature__ = inspect.signature(model.forward)
        self.__doc__ = model.forward.__doc__
        self.forget()

    def forget(self) -> None:
        self.step: Step | None = None
        self.steps = 0
        self.why_plain: str | None = None
        self.last_cache: Callable = lambda: None

    def __getstate__(self) -> dict:
        """What a copy or a pickle of the model takes along: no step, which is around this model's modules."""
        return {name: self.__dict__[name] for name in ("model", "__signature__", "__doc__")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.forget()

    def __call__(self, *args, **kwargs) -> CausalLMOutputWithCrossAttentions | Seq2SeqLMOutput:
        output = None if args else self.decode(**with_one_name(kwargs))
        if output is None:
            return type(self.model).forward(self.model, *args, **kwargs)
        self.steps += 1
        return output

    def decode(self, **kwargs):
        """The output for one new token per row, or `None` where the call is another or must be computed plainly."""
        raise NotImplementedError

    def is_step(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        logits_to_keep: int | torch.Tensor,
        others: dict,
    ) -> bool:
        """
        Whether a call is for the next token of every row, with a cache that can be taken over and nothing asked for but
        logits; `others` are the arguments without a meaning here.
        """
        model, config = self.model, self.model.config
        return (
            cache is not None
            and type(input_ids) is torch.Tensor
            and input_ids.ndim == 2
            and input_ids.shape[1] == 1
            and input_ids.shape[0] <= MOST_SEQUENCES
            and input_ids.device.type == "cpu"
            and use_cache is not False
            and isinstance(logits_to_keep, int)
            and all(value is None or value is False for value in others.values())
            and not model.training
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not is_tracing(input_ids)
            and not getattr(config, "output_hidden_states", False)
            and not getattr(config, "output_attentions", False)
            and getattr(config, "return_dict", True)
            and can_hold(self_attention_half(cache))
            and (past := cache.get_seq_length()) > 0
            and (
                attention_mask is None
                or (torch.is_tensor(attention_mask) and attention_mask.shape == (input_ids.shape[0], past + 1))
            )
        )

    def current_step(self, stack: VariantModel, cache: Cache) -> Step | None:
        """The step for the modules as they are now; `None` where they cannot be passed by, and `why_plain` says so."""
        is_new = self.last_cache() is not cache
        self.last_cache = weakref.ref(cache)
        if self.step is not None and self.step.agrees(is_new):
            return self.step
        # Nothing has changed since it was refused, as far as a step looks.
        if self.step is None and self.why_plain is not None and not is_new:
            return None
        self.step, self.why_plain = None, None
        implementation = stack.config._attn_implementation
        try:
            if has_global_hooks():
                raise NotImplementedError("There are hooks on all modules.")
            if implementation != "eager" and ALL_ATTENTION_FUNCTIONS.get(implementation) is not SDPA:
                raise NotImplementedError(f"The attention implementation {implementation} is not known here.")
            self.step = Step(self.model, stack)
        except NotImplementedError as error:
            self.why_plain = str(error)
        return self.step


class CausalForward(AcceleratedForward):
    """Of a decoder."""

    def decode(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep=0,
        token_type_ids=None,
        task_type_ids=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        return_dict=None,
        **others,
    ):
        cache = past_key_values
        if return_dict is False or not self.is_step(
            input_ids, attention_mask, cache, use_cache, logits_to_keep, others
        ):
            return None
        if encoder_hidden_states is not None and not source_is_known(cache):
            return None
        step = self.current_step(self.model.model, cache)
        if step is None:
            return None
        make_roomy(self_attention_half(cache))
        logits = step(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            token_type_ids,
            task_type_ids,
            encoder_hidden_states,
            encoder_attention_mask,
        )
        return CausalLMOutputWithCrossAttentions(logits=logits, **{CACHE: cache})


class Seq2SeqForward(AcceleratedForward):
    """Of an encoder-decoder: the encoder, and the first step of its decoder, are the plain ones."""

    def decode(
        self,
        decoder_input_ids=None,
        attention_mask=None,
        decoder_attention_mask=None,
        decoder_position_ids=None,
        encoder_outputs=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep=0,
        decoder_token_type_ids=None,
        return_dict=None,
        **others,
    ):
        cache = past_key_values
        if (
            encoder_outputs is None
            or return_dict is False
            or not source_is_known(cache)
            or not self.is_step(decoder_input_ids, decoder_attention_mask, cache, use_cache, logits_to_keep, others)
        ):
            return None
        step = self.current_step(self.model.model.decoder, cache)
        if step is None:
            return None
        make_roomy(self_attention_half(cache))
        logits = step(
            decoder_input_ids,
            decoder_attention_mask,
            decoder_position_ids,
            cache,
            decoder_token_type_ids,
            encoder_states=encoder_outputs[0],
            encoder_mask=attention_mask,
        )
        if self.model.config.final_logits_bias:
            logits = logits + self.model.final_logits_bias
        return Seq2SeqLMOutput(
            logits=logits,
            **{CACHE: cache},
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )


def source_is_known(cache: Cache | None) -> bool:
    """Whether a cache holds the projected source of every layer."""
    return (
        type(cache) is EncoderDecoderCache
        and can_hold(cache.cross_attention_cache)
        and len(cache.is_updated) > 0
        and all(cache.is_updated.values())
    )


FORWARDS: dict[type, type[AcceleratedForward]] = {
    VariantForCausalLM: CausalForward,
    VariantForConditionalGeneration: Seq2SeqForward,
}


class Acceleration:
    """
    What `accelerate_decoding` did to a model, to be taken back with `restore()` or at the end of a `with` block.

    Attributes:
        model: the model.
    """

    def __init__(self, model: nn.Module, forward: AcceleratedForward):
        self.model = model
        self._forward = forward

    @property
    def steps(self) -> int:
        """Number of steps that went the fast way."""
        return self._forward.steps

    @property
    def why_plain(self) -> str | None:
        """Why the last step was computed plainly after all, or `None`."""
        return self._forward.why_plain

    @property
    def called_modules(self) -> list[str]:
        """Names of the modules that the last step called, instead of reading their weights: adapters, for example."""
        step = self._forward.step
        called = set(step.called) if step else set()
        return [name for name, module in self.model.named_modules() if module in called]

    def restore(self) -> None:
        """Compute everything plainly again. A cache in use goes on working."""
        if self.model.__dict__.get("forward") is self._forward:
            del self.model.forward

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, *exception) -> None:
        self.restore()


def accelerate_decoding(model: nn.Module) -> Acceleration:
    """
    Have `generate` decode faster on a CPU, in float32, with the same weights in the same place.

    A step for one new token per row (at most 32 rows, with a dynamic cache) reads the weights where they lie, with
    products that use all cores, and writes keys and values into memory with room for more. Prefill, training, outputs
    of hidden states or attention weights, other caches and other dtypes are computed as before; so is, module by
    module, what an adapter or a quantizer replaced. Nothing is copied or packed, so that weights may change at any
    time, and what is saved does not change. Logits agree with the plain ones up to the rounding of float32.

    Args:
        model: a `VariantForCausalLM` or `VariantForConditionalGeneration`, or a PEFT model of one.

    Returns:
        an `Acceleration`, to be restored or used as a context manager.

    Raises:
        ValueError: if the model is of another class, not in float32 on the CPU, or if its `forward` was replaced.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if type(model) not in FORWARDS:
        raise ValueError(
            f"{type(model).__name__} does not generate. Pass a VariantForCausalLM or a VariantForConditionalGeneration."
        )
    replaced = model.__dict__.get("forward")
    if isinstance(replaced, AcceleratedForward):
        return Acceleration(model, replaced)
    if replaced is not None:
        raise ValueError(
            "The `forward` of this model was replaced, by accelerate or a trainer, and would be passed by. Call "
            "`accelerate_decoding` on a model that was just loaded, without a `device_map`."
        )
    stack = model.get_decoder()
    weight = next(parameter for parameter in stack.parameters() if parameter.is_floating_point())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ValueError(
            f"The model is in {str(weight.dtype).removeprefix('torch.')} on {weight.device}, and the fast path computes in "
            "float32 on the CPU. Load it with `dtype=torch.float32` and without a `device_map`."
        )
    model.forward = FORWARDS[type(model)](model)
    return Acceleration(model, model.forward)

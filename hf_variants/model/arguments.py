"""Which arguments a forward takes by place: those of the stock class that a model comes from, in its order."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast


# What transformers calls `past_key_values`, in arguments and outputs; since 5.24 `cache`.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


# Of a stack with token types, as in BERT and its relatives; a class takes those of them that it names.
ORDER_WITH_TOKEN_TYPES = (
    "input_ids", "attention_mask", "token_type_ids", "task_type_ids", "position_ids", "inputs_embeds",
    "encoder_hidden_states", "encoder_attention_mask", "labels", "start_positions", "end_positions",
    "past_key_values", "use_cache", "logits_to_keep",
)  # fmt: skip


def argument_names(function: Callable) -> tuple[str, ...]:
    """The arguments that a method names, in the order of its signature; the cache by the name that configs have."""
    parameters = inspect.signature(function).parameters.values()
    names = (one.name for one in parameters if one.name != "self" and one.kind is not one.VAR_KEYWORD)
    return tuple("past_key_values" if name == CACHE else name for name in names)


def with_one_name(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the cache as `past_key_values`; continuous batching's is none of a model, and stays."""
    if CACHE == "past_key_values" or not isinstance(arguments.get(CACHE, ""), (Cache, type(None))):
        return arguments
    if "past_key_values" in arguments:
        raise TypeError(f"`{CACHE}` and `past_key_values` are two names of one argument. Pass one of them.")
    return {"past_key_values" if name == CACHE else name: value for name, value in arguments.items()}


def signature_with_stock_names(function: Callable) -> inspect.Signature:
    """The signature of a `forward` as the installed transformers would write it."""
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    return signature.replace(
        parameters=[one.replace(name=CACHE) if one.name == "past_key_values" else one for one in parameters]
    )


def usual_order(model_class: type, config: PreTrainedConfig) -> tuple[str, ...]:
    """The order in which a class takes its arguments where `argument_order` says nothing of it."""
    names = argument_names(model_class.forward)
    if config.is_encoder_decoder:
        return names
    absent = set()
    if not config.type_vocab_size and config.token_type_table == "own":
        absent.add("token_type_ids")
    if not config.task_type_vocab_size:
        absent.add("task_type_ids")
    order = ORDER_WITH_TOKEN_TYPES if config.type_vocab_size else names
    return tuple(name for name in order if name in names and name not in absent)


def order_of(model_class: type, config: PreTrainedConfig) -> tuple[str, ...]:
    """The order in which a class takes its arguments."""
    orders = config.argument_order or {}
    own = next((orders[one.__name__] for one in model_class.__mro__ if one.__name__ in orders), None)
    return usual_order(model_class, config) if own is None else tuple(name.strip() for name in own.split(","))


def by_name(order: tuple[str, ...], values: Iterable[Any]) -> dict[str, Any]:
    """Arguments given by place, by their names; an error where they are too many, or plainly of another order."""
    values = tuple(values)
    wrong = (
        "" if len(values) <= len(order) else f"{len(values)} arguments are given by place, and {len(order)} have one."
    )
    named = dict(zip(order, values, strict=False))
    for name, value in named.items():
        if value is not None and isinstance(value, Cache) != (name == "past_key_values"):
            wrong = f"A {type(value).__name__} is given in the place of `{name}`."
    if wrong:
        raise TypeError(f"{wrong} The order is {', '.join(order)}. Pass what follows `{order[0]}` by name.")
    return named


def in_stock_order(forward: Callable) -> Callable:
    """Decorate a model's `forward`, so that arguments by place are those at `self.argument_order`."""

    # `generate` and Trainer look at the signature.
    @functools.wraps(forward)
    def by_place(self, *args, **kwargs):
        kwargs = with_one_name(kwargs)
        if len(args) > 1:
            given = by_name(self.argument_order, args)
            if twice := given.keys() & kwargs.keys():
                raise TypeError(f"`{min(twice)}` is given twice, by place and by name.")
            args, kwargs = (), given | kwargs
        return forward(self, *args, **kwargs)

    by_place.__signature__ = signature_with_stock_names(forward)
    return by_place

"""The layers of a stack as source: each class once, under a name that says what sets it apart."""

import re
import string
from typing import Any

from .axes import Stack


# What is written of a layer, each after what it uses -> the end of its name, and whether a layer of this kind has it.
COMPONENTS = {
    "eager": ("eager_attention_forward", lambda view: "self_attn" in view.sublayers),
    "attention": ("Attention", lambda view: "self_attn" in view.sublayers),
    "cross_attention": ("CrossAttention", lambda view: view.cross),
    "mlp": ("MLP", lambda view: "mlp" in view.sublayers),
    "scale": ("LearnedScale", lambda view: bool(view.learned_scale)),
    "block": ("Block", lambda view: True),
}
# The components that take sizes from a layer's own config, and which of them a block hands it to.
SIZED = {"attention": ("attention", "cross_attention"), "block": ("mlp", "scale", "block")}


def write_layers(macros: Any, stack: Stack) -> None:
    """
    Fill in the definitions of a stack's layers, and their names, as the templates expect them.

    Args:
        macros: the rendered template with the layers' macros.
        stack: of one kind of layer or several (`Stack.views`).
    """
    stack.definitions = _definitions(macros, stack)
    # Which classes read a size that layers differ in is known when all are written.
    for where, components in SIZED.items():
        read = {name for one in components for name in re.findall(r"\bconfig\.(\w+)", stack.definitions[one])}
        if read & set(stack.differing):
            for view in stack.views:
                view.sized.add(where)
    stack.definitions = _definitions(macros, stack)


def share_attention(macros: Any, encoder: Stack, decoder: Stack) -> None:
    """Let two stacks have one class of self-attention, and one of biases, where these differ in the direction alone."""
    stacks = (encoder, decoder)
    for joint in (True, False):
        for stack in stacks:
            stack.joint_bias = joint and stack.relative
        biases = {macros.relative("", stack).replace(stack.prefix, "") for stack in stacks if stack.relative}
        if len(biases) == 1 and encoder.relative and decoder.relative:
            break
    if any(len(stack.views) > 1 for stack in stacks):
        return
    for joint in (True, False):
        texts = set()
        for stack in stacks:
            stack.joint = joint
            write_layers(macros, stack)
            used = macros.linear_classes(stack.prefix, stack) + (macros.rotation(stack) if stack.rotary else "")
            text = used + stack.definitions["eager"] + stack.definitions["attention"]
            texts.add(text.replace(stack.prefix, stack.name))
        if len(texts) == 1:
            return


def _definitions(macros: Any, stack: Stack) -> dict[str, str]:
    written = {}
    for component, (ending, has) in COMPONENTS.items():
        groups: dict[str, list[Stack]] = {}
        for view in filter(has, stack.views):
            view.names[component] = "@"
            groups.setdefault(_render(macros, component, stack.prefix, view), []).append(view)
        names = _names(stack, "" if component == "eager" else stack.prefix, ending, list(groups.values()))
        for name, group in zip(names, groups.values()):
            for view in group:
                view.names[component] = name
        written[component] = "\n".join(_render(macros, component, stack.prefix, group[0]) for group in groups.values())
    return written


def _render(macros: Any, component: str, prefix: str, view: Stack) -> str:
    if component == "eager":
        return macros.eager(view)
    if component in ("attention", "cross_attention"):
        return macros.attention(prefix, view, component == "cross_attention")
    if component == "mlp":
        return macros.feed_forward(prefix, view)
    return macros.learned_scale(view) if component == "scale" else macros.block(view)


def _names(stack: Stack, prefix: str, ending: str, groups: list[list[Stack]]) -> list[str]:
    """
    What to call a component of several groups of layers: by the first field that tells them apart, else by letters.

    Args:
        prefix: of classes; functions have none.
    """
    if len(groups) == 1:
        return [f"{prefix}{ending}"]
    for field in stack.differing:
        if any(type(view.value_of(field)) in (int, float) for view in stack.views):
            # Numbers stay in the config.
            continue
        values = [{_hashable(view.value_of(field)) for view in group} for group in groups]
        words = [_word(field, group[0].value_of(field)) for group in groups]
        if all(len(of_group) == 1 for of_group in values) and len(set(words)) == len(words):
            return [f"{prefix}{word}{ending}" if prefix else f"{_snake(word)}_{ending}".strip("_") for word in words]
    letters = string.ascii_uppercase if prefix else [f"_{letter}" for letter in string.ascii_lowercase]
    return [f"{prefix}{ending}{letter}" for letter, _ in zip(letters, groups)]


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _word(field: str, value: Any) -> str:
    """`"norm_placement", "post"` -> `"Post"`; `"attention_sinks", True` -> `"Sinks"`; nothing for what is off."""
    if field == "skip":
        return "".join({"self_attn": "FeedForward", "mlp": "Attention"}[name] + "Only" for name in value)
    if value in (None, False, "none"):
        return "Plain"
    subject = field.removeprefix("attention_").removeprefix("attn_")
    return "".join(word.capitalize() for word in (subject if value is True else value).split("_"))


def _snake(word: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", word).lower()

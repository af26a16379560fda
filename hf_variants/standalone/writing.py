"""A variant as source: one file with its model, one with its config, and nothing that it does not use."""

import copy
import importlib.util
import itertools
import re
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedConfig, PreTrainedModel

import hf_variants

from ..model.arguments import order_of
from ..model.axis import quote
from ..model.configuration_variant import FIELDS
from ..model.normalization import NORM_KINDS
from .axes import NotStandalone, Stack
from .layers import share_attention, write_layers


LINE_LENGTH = 119

# Module -> the names that a written file may use of it.
IMPORTS = {
    "collections.abc": ["Callable"],
    "functools": ["partial"],
    "torch": ["nn"],
    "transformers.activations": ["ACT2CLS", "ACT2FN"],
    "transformers.configuration_utils": ["PreTrainedConfig"],
    "transformers.cache_utils": ["Cache", "DynamicCache", "EncoderDecoderCache", "StaticCache"],
    "transformers.generation": ["GenerationMixin"],
    "transformers.integrations.sdpa_attention": ["repeat_kv"],
    "transformers.masking_utils": [
        "create_bidirectional_mask",
        "create_bidirectional_sliding_window_mask",
        "create_causal_mask",
        "create_sliding_window_causal_mask",
        "find_packed_sequence_indices",
        "packed_sequence_mask_function",
    ],
    "transformers.modeling_layers": ["GradientCheckpointingLayer"],
    "transformers.modeling_outputs": [
        "BaseModelOutput",
        "BaseModelOutputWithPast",
        "BaseModelOutputWithPastAndCrossAttentions",
        "BaseModelOutputWithPooling",
        "CausalLMOutputWithPast",
        "MaskedLMOutput",
        "MultipleChoiceModelOutput",
        "QuestionAnsweringModelOutput",
        "Seq2SeqLMOutput",
        "Seq2SeqModelOutput",
        "Seq2SeqQuestionAnsweringModelOutput",
        "Seq2SeqSequenceClassifierOutput",
        "SequenceClassifierOutput",
        "SequenceClassifierOutputWithPast",
        "TokenClassifierOutput",
    ],
    "transformers.modeling_rope_utils": ["ROPE_INIT_FUNCTIONS", "dynamic_rope_update"],
    "transformers.modeling_utils": ["ALL_ATTENTION_FUNCTIONS", "PreTrainedModel"],
    "transformers.pytorch_utils": ["apply_chunking_to_forward"],
    "transformers.utils": ["ModelOutput", "can_return_tuple", "is_tracing"],
    "transformers.utils.generic": ["merge_with_config_defaults"],
    "transformers.utils.output_capturing": ["OutputRecorder", "capture_outputs"],
}
MODULES = {
    "copy": "copy",
    "math": "math",
    "torch": "torch",
    "F": "torch.nn.functional",
    "init": "transformers.initialization",
}

# What every config has, beside what its model reads.
ALWAYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "max_position_embeddings", "initializer_range", "tie_word_embeddings", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


# What new weights need beside transformers' own initialisation -> how to see it in the text.
INITIALISED = {
    "buffers": "def reset_buffers",
    "stds": ".init_std = ",
    "resets": "def reset_weights",
    "sinks": "self.sinks = ",
    "xavier": ".xavier_gain = ",
}


class Source(NamedTuple):
    """
    Attributes:
        name: prefix of the classes.
        stem: end of the files' names, and the model type.
        modeling, configuration: the text of the two files.
        auto_map: Auto class -> file and class.
        stacks: what the templates were told, by prefix of the classes.
        fields: by the same prefix, the fields that its config has.
    """

    name: str
    stem: str
    modeling: str
    configuration: str
    auto_map: dict[str, str]
    stacks: dict[str, Stack]
    fields: dict[str, list[str]]

    @property
    def files(self) -> dict[str, str]:
        return {f"modeling_{self.stem}.py": self.modeling, f"configuration_{self.stem}.py": self.configuration}

    @property
    def heads(self) -> list[str]:
        """Ends of the names of the classes with a head, the language model's first."""
        names = [reference.rpartition(".")[2].removeprefix(self.name) for reference in self.auto_map.values()]
        return names[2:]

    @property
    def head(self) -> Stack:
        """The stack with the language-modelling head."""
        return list(self.stacks.values())[-1]

    def values(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Arguments of the written config class for a variant of the same kind, with as many layers or fewer."""
        if not config.is_encoder_decoder:
            return _values(self.head, self.fields[self.name], config)
        parts = {"encoder": config.encoder, "decoder": config.decoder}
        nested = {
            part: _values(self.stacks[self.name + part.title()], self.fields[self.name + part.title()], stack)
            for part, stack in parts.items()
        }
        return (
            nested
            | {name: getattr(config, name) for name in self.fields[self.name]}
            | {"tie_word_embeddings": config.tie_word_embeddings or config.share_embeddings}
        )


def names_of(name: str) -> tuple[str, str]:
    """`"my-gemma 2b"` -> `"MyGemma2b"`, `"my_gemma_2b"`."""
    words = re.findall(r"[A-Za-z0-9]+", name)
    if not words or not words[0][0].isalpha():
        raise ValueError(f"A class cannot be called after {name!r}. Give a name that begins with a letter.")
    return "".join(word[0].upper() + word[1:] for word in words), "_".join(word.lower() for word in words)


def variant_class(config: PreTrainedConfig, head: str) -> type[PreTrainedModel]:
    """The class of the package with this end of its name."""
    seq2seq = "Seq2Seq" if config.is_encoder_decoder and head != "ForConditionalGeneration" else ""
    return getattr(hf_variants, f"Variant{seq2seq}{head}")


# Of one stack: a class with a head -> its Auto class. A model without a head gets the language model's beside it.
AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}


def write_source(config: PreTrainedConfig, name: str, head: str = "Model") -> Source:
    """
    The two files of a variant.

    Args:
        config: of a decoder, an encoder or an encoder-decoder.
        name: what its classes are called after.
        head: end of the name of the variant's class, such as `"ForSequenceClassification"`.

    Raises:
        NotStandalone: if a field or the head asks for what one file does not cover.
    """
    prefix, stem = names_of(name)
    norms: dict[str, dict] = {}
    if config.is_encoder_decoder:
        parts = {f"{prefix}Encoder": config.encoder, f"{prefix}Decoder": config.decoder}
        if head == "Model":
            head = "ForConditionalGeneration"
        stacks = {
            part: Stack(stack, part, prefix, norms, in_seq2seq=True, head=head if part.endswith("Decoder") else "")
            for part, stack in parts.items()
        }
        if head == "ForSequenceClassification" and (config.decoder.classifier_pooling, config.pad_token_id) == (
            "last",
            None,
        ):
            raise NotStandalone(
                "`classifier_pooling` is last, and there is no `pad_token_id` to find the last token by"
            )
        classes = {
            "AutoModel": "Model",
            (AUTO_CLASSES | {"ForConditionalGeneration": "AutoModelForSeq2SeqLM"})[head]: head,
        }
    else:
        if head == "Model":
            head = "ForCausalLM" if config.is_causal else "ForMaskedLM"
        if head not in AUTO_CLASSES:
            raise NotStandalone(f"the head of Variant{head} is not covered by a standalone file yet")
        if head in (own := {"ForCausalLM": True, "ForMaskedLM": False}) and own[head] != config.is_causal:
            raise NotStandalone(f"`is_causal` is {config.is_causal}, which is not the language model of Variant{head}")
        stacks = {prefix: Stack(config, prefix, prefix, norms, head=head)}
        if stacks[prefix].cross:
            raise NotStandalone("`add_cross_attention` is set, and a standalone file has no encoder")
        classes = {"AutoModel": "Model", AUTO_CLASSES[head]: head}
    top = {name: getattr(config, name) for name in SEQ2SEQ_FIELDS if config.is_encoder_decoder}
    arguments = {
        "N": prefix, "stacks": stacks, "head": list(stacks.values())[-1],
        "top": top | {"tie_head": config.tie_word_embeddings},
    }  # fmt: skip
    template = _environment().get_template("modeling.jinja")
    macros = _environment().get_template("layers.jinja").module
    for stack in stacks.values():
        write_layers(macros, stack)
    if config.is_encoder_decoder:
        share_attention(macros, *stacks.values())
    arguments["eager_by_default"] = config.eager_by_default
    arguments["has_cache"] = any(stack.is_causal for stack in stacks.values())
    views = [view for stack in stacks.values() for view in stack.views]
    arguments["activations"] = {view.hidden_act: view.fresh_activation for view in views if view.fresh_activation}
    starts = {view.new_sinks for view in views if view.new_sinks}
    if len(starts) > 1:
        raise NotStandalone("`initializer_sinks` is not the same in both stacks")
    arguments["new_sinks"] = next(iter(starts), None)
    arguments["block_names"] = [name for stack in stacks.values() for name in stack.written("block")]
    # Which norms there are, and what has to be initialised, is known when all is written.
    template.render(norms={}, inits=[], **arguments)
    body = template.render(norms=dict(norms), inits=[], **arguments)
    inits = [what for what, mark in INITIALISED.items() if mark in body]
    sections = _sections(template.render(norms=dict(norms), inits=inits, **arguments))
    fields = {}
    for part, stack in stacks.items():
        text = "".join(text for title, text in sections if title == part or len(stacks) == 1)
        if stack.seq2seq and stack.cross:
            heads = "".join(text for title, text in sections if title == "head")
            text += re.sub(r"\bconfig\.decoder\.", "config.", heads)
        fields[part] = _fields_of(text, stack)
        stack.refuse_unread(set(fields[part]))
    if config.is_encoder_decoder:
        sections = shared_between(sections, prefix)
        fields[prefix] = ["is_encoder_decoder", "decoder_start_token_id", "use_cache", "initializer_range",
                          "bos_token_id", "eos_token_id", "pad_token_id"]  # fmt: skip
    body = "".join(text for _, text in sections)
    # As ruff sorts imports: two lines before a class or a function, one before anything else.
    gap = "\n\n\n" if body.startswith(("class ", "def ", "@")) else "\n\n"
    modeling = f'"""{_docstring(stacks, prefix)}"""\n\n{_imports(body, prefix, stem)}{gap}{body}'
    auto_map = {"AutoConfig": f"configuration_{stem}.{prefix}Config"}
    auto_map |= {auto: f"modeling_{stem}.{prefix}{end}" for auto, end in classes.items()}
    for end in classes.values():
        modeling = _in_order(modeling, f"{prefix}{end}", config, end)
    source = Source(prefix, stem, _formatted(modeling), "", auto_map, stacks, fields)
    return source._replace(configuration=_formatted(_configurations(source, config)))


@cache
def _environment() -> jinja2.Environment:
    # Compiles each template once.
    return jinja2.Environment(
        loader=jinja2.PackageLoader("hf_variants.standalone", "."),
        line_statement_prefix="%%",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


def _in_order(text: str, class_name: str, config: PreTrainedConfig, end: str) -> str:
    """The text with the signature of a class's `forward` in the order that the variant's has under its config."""
    order = order_of(variant_class(config, end), config)
    start = text.index("    def forward(\n        self,\n", text.index(f"class {class_name}("))
    start = text.index("self,\n", start) + len("self,\n")
    stop = text.index("        **kwargs,\n", start)
    lines = {line.split(":")[0].strip(): line for line in text[start:stop].splitlines(keepends=True)}
    by_place = list(itertools.takewhile(lines.__contains__, order))
    # What follows one that is not there would move up.
    rest = [name for name in lines if name not in by_place]
    mark = ["        *,\n"] if rest and len(by_place) < len(order) else []
    return (
        text[:start]
        + "".join([*(lines[name] for name in by_place), *mark, *(lines[name] for name in rest)])
        + text[stop:]
    )


# Of an encoder-decoder, beside its stacks: the template resolves them.
SEQ2SEQ_FIELDS = (
    "share_embeddings", "one_vocabulary", "unread_shared_embedding", "final_logits_bias", "label_shift",
    "decoder_inputs_from_source", "labels_disable_cache",
)  # fmt: skip


def _sections(body: str) -> list[tuple[str, str]]:
    """The text by the stack that it is of; `"norms"` and `"head"` are nobody's."""
    parts = re.split(r"^#: (\w+)\n", "#: norms\n" + body, flags=re.M)[1:]
    return list(zip(parts[::2], parts[1::2]))


def shared_between(sections: list[tuple[str, str]], prefix: str) -> list[tuple[str, str]]:
    """What both stacks define alike stands once, under the name without the stack; other functions get its name."""
    stacks = [f"{prefix}Encoder", f"{prefix}Decoder"]
    texts = dict.fromkeys(stacks, "")
    for title, text in sections:
        if title in texts:
            texts[title] += text
    found = {
        stack: dict(re.findall(r"^((?:class|def) \w+)((?:.|\n)*?)(?=\n(?:class|def) |\Z)", text, flags=re.M))
        for stack, text in texts.items()
    }
    renamed = {
        stack: {head.split()[1]: f"{head} {body}".replace(stack, prefix).strip() for head, body in definitions.items()}
        for stack, definitions in found.items()
    }
    plain = {
        stack: {name.replace(stack, prefix): (name, text) for name, text in named.items()}
        for stack, named in renamed.items()
    }
    one, two = (plain[stack] for stack in stacks)
    alike = {name for name in one if name in two and one[name][1] == two[name][1]}
    while True:
        # A definition that uses one which differs differs as well.
        others = (one.keys() | two.keys()) - alike
        wrong = {name for name in alike if any(re.search(rf"\b{other}\b", one[name][1]) for other in others - {name})}
        if not wrong:
            break
        alike -= wrong
    made, shared = [], []
    for title, text in sections:
        if title not in stacks:
            made.append((title, text))
            continue
        short = title.removeprefix(prefix).lower()
        pieces = re.split(r"^(?=class |def )", text, flags=re.M)
        kept = [pieces[0]]
        for piece in pieces[1:]:
            own = re.match(r"(?:class|def) (\w+)", piece)
            name = own.group(1).replace(title, prefix) if own else ""
            if name not in alike:
                kept.append(piece)
            elif title == stacks[0]:
                shared.append(piece)
                kept.append(piece)
        text = "".join(kept)
        for name, (own_name, _) in plain[title].items():
            if name in alike:
                text = re.sub(rf"\b{own_name}\b", name, text)
            elif own_name[0].islower() and name in one and name in two:
                text = re.sub(rf"(?<![\w.]){own_name}\b", f"{short}_{own_name}", text)
        for name in alike:
            # What both use takes either config.
            text = re.sub(
                rf"(class {name}\(.*?\):(?:.|\n)*?config: ){title}Config", r"\1PreTrainedConfig", text, count=1
            )
        made.append((title, text))
    return made


def _fields_of(text: str, stack: Stack) -> list[str]:
    """The fields that the config of a written stack has."""
    read = set(re.findall(r"\bconfig\.([a-z_0-9]+)", text))
    if stack.rotary:
        read.add("rope_parameters")
    if stack.layer_kinds != ["full_attention"]:
        read.add("sliding_window")
    if not stack.kv_equal or "num_key_value_heads" in stack.differing:
        read.add("num_key_value_heads")
    return [name for name in FIELDS if name in read or name in ALWAYS]


def _values(stack: Stack, fields: list[str], config: PreTrainedConfig) -> dict[str, Any]:
    # Of the stack, where layers differ: what those have that change nothing.
    values = {name: vars(config)[name] for name in fields}
    if layers := _per_layer_values(fields, config):
        values["per_layer_config"] = layers
    if stack.rotary:
        values["rope_parameters"] = copy.deepcopy(stack.rope_value)
    if "layer_rope_theta" in values:
        values["layer_rope_theta"] = stack.layer_bases[: config.num_hidden_layers]
    if "no_rope_layers" in values:
        values["no_rope_layers"] = stack.no_rope_layers[: config.num_hidden_layers]
    return values


def _per_layer_values(fields: list[str], config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """The sizes and numbers of layers that differ from the stack's."""
    if not config.is_heterogeneous:
        return {}
    own = {
        layer_idx: {name: getattr(layer, name) for name in fields if getattr(layer, name) != vars(config)[name]}
        for layer_idx, layer in enumerate(config.per_layer_config)
    }
    return {layer_idx: values for layer_idx, values in own.items() if values}


def _imports(body: str, prefix: str, stem: str) -> str:
    used = set(re.findall(r"(?<![\w.])[A-Za-z_]\w*", body))
    lines = []
    for name, module in MODULES.items():
        if name in used and (name == module or re.search(rf"\b{name}\.", body)):
            lines.append((module, f"import {module}" if name == module else _import_as(module, name)))
    for module, names in IMPORTS.items():
        if found := [name for name in names if name in used]:
            line = f"from {module} import {', '.join(found)}"
            if len(line) > LINE_LENGTH:
                line = f"from {module} import (\n    " + ",\n    ".join(found) + ",\n)"
            lines.append((module, line))
    standard = [line for module, line in lines if module.split(".")[0] in sys.stdlib_module_names]
    others = [(module, line) for module, line in lines if module.split(".")[0] not in sys.stdlib_module_names]
    ordered = sorted(others, key=lambda pair: (pair[1].startswith("from"), pair[1].split()[1], pair[1]))
    groups = [
        "\n".join(sorted(standard, key=lambda line: line.startswith("from"))),
        "\n".join(line for _, line in ordered),
    ]
    configs = sorted(set(re.findall(rf"\b{prefix}(?:Encoder|Decoder)?Config\b", body)))
    return "\n\n".join([*filter(None, groups), f"from .configuration_{stem} import {', '.join(configs)}"])


def _import_as(module: str, name: str) -> str:
    package, _, last = module.rpartition(".")
    return f"from {package} import {last} as {name}" if package == "transformers" else f"import {module} as {name}"


def _docstring(stacks: dict[str, Stack], prefix: str) -> str:
    kinds = ["decoder" if stack.is_causal else "encoder" for stack in stacks.values()]
    lines = [f"{prefix}: a Transformer {'-'.join(kinds)} in one file."]
    for kind, stack in zip(kinds, stacks.values()):
        lines += ["", f"{kind.title()}:"] if len(kinds) > 1 else [""]
        lines += [textwrap.fill(f"- {line}", LINE_LENGTH, subsequent_indent="  ") for line in features(stack)]
    return "\n".join([*lines, ""])


def features(stack: Stack) -> list[str]:
    """What sets a stack apart, a line each."""
    config = stack.config
    heads = "as many key and value heads" if stack.kv_equal else "fewer key and value heads"
    positions = {
        "rope": "rotary positions" + (" on a part of each head" if stack.rope_partial else ""),
        "learned": "learned positions",
        "sinusoidal": "sinusoidal positions",
        "alibi": "ALiBi: a bias on the scores that grows with the distance",
        "relative_bias": "learned biases on the scores, by bucket of distance",
        "none": "no positions",
    }[config.position_embedding_type]
    found = [
        f"{NORM_KINDS[config.norm_type].name}; {stack.block_words[0].lower()}{stack.block_words[1:-1]}",
        f"{positions}{', not in every layer' if stack.rotates_rule else ''}",
        f"attention with {heads}{', some layers with a sliding window' if len(stack.layer_kinds) > 1 else ''}",
        f"feed-forward network {'gated by ' if stack.gated else 'with '}{config.hidden_act}",
    ]
    others = {
        "a norm on queries and keys": stack.qk_norm != "none",
        "every layer attends within a sliding window": stack.layer_kinds == ["sliding_attention"],
        "attention scores capped by tanh": stack.softcap,
        "attention sinks": stack.sinks,
        f"a {stack.gate} gate on the attention's output": stack.gate != "none",
        "queries, keys and values clamped": stack.clip,
        "norms before the output projections (sub-LN)": stack.attention_sub_norm or stack.ffn_sub_norm,
        "learned scales on the branches": bool(stack.learned_scale),
        "branches multiplied by a constant": stack.branch_multiplied,
        "token embeddings multiplied by a constant": config.embedding_multiplier != 1.0,
        "a norm on the embeddings": bool(stack.embedding_norm),
        "token types": bool(stack.token_types),
        "logits scaled": stack.logit_scaled,
        "logits capped by tanh": stack.logit_cap,
        "one matrix for the token embedding and the head": config.tie_word_embeddings,
        "z-loss": stack.z_loss,
        "label smoothing": stack.smoothing,
    }
    differing = f"layers that differ in {quote(stack.differing)}; the above is the first layer's"
    return found + [line for line, there in others.items() if there] + ([differing] if stack.differing else [])


def _configurations(source: Source, config: PreTrainedConfig) -> str:
    values = source.values(config)
    lines = [
        f'"""Sizes and numbers of {source.name}; everything else is in modeling_{source.stem}.py."""',
        "",
        "from huggingface_hub.dataclasses import strict",
        "from transformers.configuration_utils import PreTrainedConfig",
    ]
    if not config.is_encoder_decoder:
        lines += _configuration(source, source.name, source.stem, source.head, values)
        exported = [source.name]
    else:
        stacks = {part: values.pop(part) for part in ("encoder", "decoder")}
        for part, given in stacks.items():
            name = source.name + part.title()
            lines += _configuration(source, name, f"{source.stem}_{part}", source.stacks[name], given)
        lines += _configuration(source, source.name, source.stem, None, values)
        exported = [source.name, *source.stacks]
    names = ", ".join(f'"{name}Config"' for name in sorted(exported))
    return "\n".join([*lines, "", "", f"__all__ = [{names}]", ""])


def _configuration(
    source: Source, prefix: str, model_type: str, stack: Stack | None, values: dict[str, Any]
) -> list[str]:
    """The class of one config; without a stack, of an encoder-decoder."""
    lines = [
        *("", "", "@strict"),
        f"class {prefix}Config(PreTrainedConfig):",
        f'    """Configuration of {prefix}, with the sizes it was written with as defaults."""',
        "",
        f'    model_type = "{model_type}"',
        '    keys_to_ignore_at_inference = ["past_key_values", "cache"]',
    ]
    if stack is None:
        parts = {part: f"{prefix}{part.title()}Config" for part in ("encoder", "decoder")}
        pairs = ", ".join(f'"{part}": {name}' for part, name in parts.items())
        lines += [f"    sub_configs = {{{pairs}}}", ""]
        lines += [f"    {part}: {name} | dict | None = None" for part, name in parts.items()]
    else:
        if any(key in entry for entry in stack.tables for key in ("alpha", "llama_4_scaling_beta")):
            lines.append('    ignore_keys_at_rope_validation = {"llama_4_scaling_beta", "alpha"}')
        for plan in ("base_model_tp_plan", "base_model_pp_plan"):
            if value := getattr(stack.whole, plan):
                lines.append(f"    {plan} = {value!r}".replace("'", '"'))
        lines.append("")
    layers = values.pop("per_layer_config", None)
    defaults = {name: value for name, value in values.items() if isinstance(value, list | dict)}
    for name, value in values.items():
        if name in defaults and name != "eos_token_id":
            lines.append(f"    {name}: {type(value).__name__} | None = None")
        else:
            shown = None if name in defaults else value
            lines.append(f"    {name}: {_type_of(name, value)} = {shown!r}".replace("'", '"'))
    if defaults or layers or stack is None:
        lines += ["", "    def __post_init__(self, **kwargs):"]
        for name, value in defaults.items():
            lines += [f"        if self.{name} is None:", f"            self.{name} = {value!r}".replace("'", '"')]
        if stack is None:
            for part, name in parts.items():
                lines += [f"        if not isinstance(self.{part}, {name}):"]
                lines += [f"            self.{part} = {name}(**(self.{part} or {{}}))"]
        if layers:
            lines.append(f'        kwargs.setdefault("per_layer_config", {layers!r})'.replace("'", '"'))
        lines.append("        super().__post_init__(**kwargs)")
    if layers and stack is not None and stack.rotary:
        lines += [
            "",
            "    def validate_rope(self) -> None:",
            "        # Of one layer's config: transformers reads sizes that layers may differ in.",
            "        PreTrainedConfig.validate_rope(self.per_layer_config[0])",
        ]
    return lines


def _type_of(name: str, value: Any) -> str:
    if name.endswith("token_id"):
        return "int | list[int] | None" if name == "eos_token_id" else "int | None"
    if isinstance(value, float):
        return "int | float"
    return type(value).__name__ if value is not None else "int | float | None"


def _formatted(text: str) -> str:
    """As ruff formats it, where ruff is installed; else with blank lines put right."""
    text = re.sub(r"[ \t]+\n", "\n", text)
    # What a template leaves to be assigned last is returned.
    text = re.sub(r"^( +)(\w+) = (.+)\n\n*\1return \2$", r"\1return \3", text, flags=re.M)
    text = re.sub(r"\n{3,}(?=(class|def|@|__all__))", "\n\n\n", text)
    text = re.sub(r"\n{2,}(?=    )", "\n\n", text).rstrip() + "\n"
    if importlib.util.find_spec("ruff") is None:
        return text
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", str(LINE_LENGTH), "-"]
    made = subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", check=False)
    if made.returncode:
        raise AssertionError(f"ruff cannot read what was written: {made.stderr}\n{text}")
    return made.stdout


def write_files(source: Source, folder: Path) -> None:
    for name, text in source.files.items():
        (folder / name).write_text(text, encoding="utf-8")

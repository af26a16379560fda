"""A variant as source: one file with its model, one with its config, and nothing that it does not use."""

import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedConfig

from ..model.configuration_variant import FIELDS
from .axes import NotStandalone, Stack


LINE_LENGTH = 119

# Module -> the names that a written file may use of it.
IMPORTS = {
    "collections.abc": ["Callable"],
    "functools": ["partial"],
    "torch": ["nn"],
    "transformers": [],
    "transformers.activations": ["ACT2FN"],
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
        "Seq2SeqLMOutput",
        "Seq2SeqModelOutput",
    ],
    "transformers.modeling_rope_utils": ["ROPE_INIT_FUNCTIONS", "dynamic_rope_update"],
    "transformers.modeling_utils": ["ALL_ATTENTION_FUNCTIONS", "PreTrainedModel"],
    "transformers.utils": ["can_return_tuple", "is_tracing"],
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
        stack: what the templates were told.
    """

    name: str
    stem: str
    modeling: str
    configuration: str
    auto_map: dict[str, str]
    stack: Stack

    @property
    def files(self) -> dict[str, str]:
        return {f"modeling_{self.stem}.py": self.modeling, f"configuration_{self.stem}.py": self.configuration}


def names_of(name: str) -> tuple[str, str]:
    """`"my-gemma 2b"` -> `"MyGemma2b"`, `"my_gemma_2b"`."""
    words = re.findall(r"[A-Za-z0-9]+", name)
    if not words or not words[0][0].isalpha():
        raise ValueError(f"A class cannot be called after {name!r}. Give a name that begins with a letter.")
    return "".join(word[0].upper() + word[1:] for word in words), "_".join(word.lower() for word in words)


def write_source(config: PreTrainedConfig, name: str) -> Source:
    """
    The two files of a variant.

    Args:
        config: of a decoder or an encoder.
        name: what its classes are called after.

    Raises:
        NotStandalone: if a field asks for what one file does not cover.
    """
    if config.is_encoder_decoder:
        raise NotStandalone("An encoder-decoder (`is_encoder_decoder`) is two stacks, and a standalone file has one")
    prefix, stem = names_of(name)
    norms: dict[str, dict] = {}
    stack = Stack(config, prefix, prefix, norms)
    if stack.cross:
        raise NotStandalone("`add_cross_attention` is set, and a standalone file has no encoder")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_variants.standalone", "."),
        line_statement_prefix="%%",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    head = "ForCausalLM" if config.is_causal else "ForMaskedLM"
    classes = {"AutoModel": "Model", f"AutoModel{head}": head}
    exported = sorted([f"{prefix}{end}" for end in classes.values()] + [f"{prefix}PreTrainedModel"])
    template = environment.get_template("modeling.jinja")
    arguments = {"N": prefix, "stacks": {prefix: stack}, "head": stack, "exported": json.dumps(exported)}
    # Which norms there are, and what has to be initialised, is known when all is written.
    template.render(norms={}, inits=[], **arguments)
    body = template.render(norms=dict(norms), inits=[], **arguments)
    inits = [what for what, mark in INITIALISED.items() if mark in body]
    body = template.render(norms=dict(norms), inits=inits, **arguments)
    fields = fields_of(body, stack)
    stack.refuse_unread(set(fields))
    modeling = f'"""{_docstring(stack, prefix)}"""\n\n{_imports(body, prefix, stem)}\n\n\n{body}'
    configuration = _configuration(stack, prefix, stem, fields)
    auto_map = {"AutoConfig": f"configuration_{stem}.{prefix}Config"}
    auto_map |= {auto: f"modeling_{stem}.{prefix}{end}" for auto, end in classes.items()}
    return Source(prefix, stem, _formatted(modeling), _formatted(configuration), auto_map, stack)


def fields_of(body: str, stack: Stack) -> dict[str, Any]:
    """The fields that a config of the written file has, with this variant's values."""
    read = set(re.findall(r"\bconfig\.([a-z_0-9]+)", body)) - {"is_encoder_decoder"}
    names = [name for name in FIELDS if name in read or name in ALWAYS]
    values = {name: getattr(stack.config, name) for name in names}
    if stack.rotary:
        values["rope_parameters"] = stack.rope_value
    if "no_rope_layers" in values:
        values["no_rope_layers"] = stack.no_rope_layers
    if stack.layer_kinds != ["full_attention"]:
        values["sliding_window"] = stack.config.sliding_window
    if stack.grouped or not stack.kv_equal:
        values["num_key_value_heads"] = stack.config.num_key_value_heads
    return values


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
    return "\n\n".join([*filter(None, groups), f"from .configuration_{stem} import {prefix}Config"])


def _import_as(module: str, name: str) -> str:
    package, _, last = module.rpartition(".")
    return f"from {package} import {last} as {name}" if package == "transformers" else f"import {module} as {name}"


def _docstring(stack: Stack, prefix: str) -> str:
    lines = [f"{prefix}: a Transformer {'decoder' if stack.is_causal else 'encoder'} in one file.", ""]
    return (
        "\n".join(
            lines + [textwrap.fill(f"- {line}", LINE_LENGTH, subsequent_indent="  ") for line in features(stack)]
        )
        + "\n"
    )


def features(stack: Stack) -> list[str]:
    """What sets a stack apart, a line each."""
    config = stack.config
    norm = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm", "dynamic_tanh": "DynamicTanh"}[config.norm_type]
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
        f"{norm}; {stack.block_words[0].lower()}{stack.block_words[1:-1]}",
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
    return found + [line for line, there in others.items() if there]


def _configuration(stack: Stack, prefix: str, stem: str, fields: dict[str, Any]) -> str:
    lines = [
        f'"""Sizes and numbers of {prefix}; everything else is in modeling_{stem}.py."""',
        "",
        "from huggingface_hub.dataclasses import strict",
        "from transformers.configuration_utils import PreTrainedConfig",
        "",
        "",
        "@strict",
        f"class {prefix}Config(PreTrainedConfig):",
        f'    """Configuration of {prefix}, with the sizes it was written with as defaults."""',
        "",
        f'    model_type = "{stem}"',
        '    keys_to_ignore_at_inference = ["past_key_values"]',
    ]
    if any(key in entry for entry in stack.tables for key in ("alpha", "llama_4_scaling_beta")):
        lines.append('    ignore_keys_at_rope_validation = {"llama_4_scaling_beta", "alpha"}')
    for plan in ("base_model_tp_plan", "base_model_pp_plan"):
        if value := getattr(stack.config, plan):
            lines.append(f"    {plan} = {value!r}".replace("'", '"'))
    lines.append("")
    for name, value in fields.items():
        lines.append(f"    {name}: {_type_of(name, value)} = {value!r}".replace("'", '"'))
    defaults = {name: value for name, value in fields.items() if isinstance(value, list | dict)}
    for name, value in defaults.items():
        kind = "dict" if isinstance(value, dict) else "list"
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {name}: "))
        lines[at] = f"    {name}: {kind} | None = None"
    if defaults:
        lines += ["", "    def __post_init__(self, **kwargs):"]
        for name, value in defaults.items():
            lines += [f"        if self.{name} is None:", f"            self.{name} = {value!r}".replace("'", '"')]
        lines.append("        super().__post_init__(**kwargs)")
    return "\n".join([*lines, "", "", f'__all__ = ["{prefix}Config"]', ""])


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

"""What llama.cpp's own loaders pass over although a file may say it, by the field that it stands for."""

import math
from collections.abc import Iterator
from typing import Any

from ....model.configuration_variant import VariantConfig
from ....model.configuration_variant_seq2seq import VariantSeq2SeqConfig
from ...errors import Refusal
from ...gguf_files.architectures import GEMMA_SCALES


# Read from the sources that llama-cpp-python 0.3.36 has (`load_arch_hparams`, `load_arch_tensors` and the graph of each
# architecture), and seen there.
# Architectures whose loaders take every layer for one without a window.
WITHOUT_WINDOW = {"llama", "deci", "phi3", "starcoder2"}
# Architectures whose output projection is square.
HEADS_FILL_THE_WIDTH = {
    "olmo", "olmo2", "baichuan", "qwen2", "exaone4", "nemotron", "stablelm", "phi2", "phi3", "starcoder2", "command-r",
    "cohere2", "chatglm", "gpt2", "starcoder", "gptneox", "falcon", "bloom", "mpt", "bert", "modern-bert", "eurobert",
    "nomic-bert",
}  # fmt: skip
# Architectures that want a head of its own, and that have none but the embedding.
OWN_HEAD = {"olmo2", "baichuan", "apertus", "nemotron", "stablelm", "phi2", "gptneox"}
TIED_HEAD = {"gemma", "gemma2", "command-r", "cohere2"}
# Architectures whose output projection, and whose feed-forward network, have no bias.
WITHOUT_FFN_BIAS = {
    "arcee", "smollm3", "olmo", "olmo2", "baichuan", "apertus", "ernie4_5", "seed_oss", "qwen2", "qwen3", "exaone4",
    "gemma", "gemma2", "gemma3", "gemma-embedding", "stablelm", "phi3", "command-r", "cohere2", "chatglm", "glm4",
    "falcon", "modern-bert", "eurobert", "hunyuan-dense",
}  # fmt: skip
WITHOUT_OUTPUT_BIAS = WITHOUT_FFN_BIAS - {"apertus", "ernie4_5"}
# Architectures that want these.
WITH_BIASES = {"gptneox", "jais2", "phi2", "starcoder2"}
# EXAONE 4's loader knows a window, and layers without a rotation, in the model of 32B parameters alone, by its layers.
LAYERS_OF_EXAONE_32B = 64
# Baichuan's rotates in the model of 7B, and has ALiBi in that of 13B; others know no positions.
LAYERS_OF_BAICHUAN = (32, 40)
# Command R's has norms on queries and keys in the larger models, and in these always.
LAYERS_OF_COMMAND_R_WITH_NORMS = 64
# Architectures whose graphs divide frequencies by a tensor.
FREQUENCY_FACTORS = {
    "llama", "apertus", "arcee", "cohere2", "deci", "exaone4", "granite", "hunyuan-dense", "mistral3", "phi3",
}  # fmt: skip
# Architectures whose loaders read where YaRN's bands begin and end; others have the published ones.
YARN_BANDS = {"mistral3"}
USUAL_BANDS = {"beta_fast": 32.0, "beta_slow": 1.0}


def unread(config: VariantConfig | VariantSeq2SeqConfig, architecture: str) -> dict[str, tuple[Any, Refusal]]:
    """The fields that the runtime does not compute in an architecture, with their values and the reasons."""
    if not isinstance(config, VariantConfig):
        return _lost_of_pair(config)
    found = {field: Refusal(why) for field, why in _lost(config, architecture)}
    values = config.to_dict()
    return {field: (values[field], why) for field, why in found.items()}


def _lost_of_pair(config: VariantSeq2SeqConfig) -> dict[str, tuple[Any, Refusal]]:
    found: dict[str, tuple[Any, Refusal]] = {}
    layers, scale = config.decoder.num_hidden_layers, config.decoder.lm_head_input_scale
    if layers > config.encoder.num_hidden_layers:
        why = Refusal("llama.cpp keeps settings for as many layers as the encoder has")
        found["decoder.num_hidden_layers"] = (layers, why)
    if scale != 1.0:
        why = Refusal(
            "llama.cpp multiplies nothing before the head: the order of tokens stays, their probabilities do not"
        )
        found["decoder.lm_head_input_scale"] = (scale, why)
    return found


def _lost(config: VariantConfig, architecture: str) -> Iterator[tuple[str, str]]:
    layers = config.num_hidden_layers
    if _windows(config) and architecture in WITHOUT_WINDOW:
        yield (
            "sliding_window",
            "llama.cpp does not read it for this architecture; as wide as the context it changes nothing",
        )
    if architecture == "exaone4" and "sliding_attention" in config.layer_types and layers != LAYERS_OF_EXAONE_32B:
        yield (
            "sliding_window",
            f"llama.cpp knows layers with a window in a model of {LAYERS_OF_EXAONE_32B} layers alone",
        )
    if architecture == "baichuan" and layers not in LAYERS_OF_BAICHUAN:
        yield "num_hidden_layers", f"llama.cpp knows models of {' and '.join(map(str, LAYERS_OF_BAICHUAN))} layers"
    if config.is_causal and config.tie_word_embeddings and architecture in OWN_HEAD:
        yield "tie_word_embeddings", "llama.cpp wants a head of its own for this architecture"
    if not config.tie_word_embeddings and architecture in TIED_HEAD:
        yield "tie_word_embeddings", "llama.cpp takes the embedding for the head in this architecture"
    if config.attention_output_bias and architecture in WITHOUT_OUTPUT_BIAS:
        yield "attention_output_bias", "llama.cpp's output projection has none in this architecture"
    for field in ("attention_output_bias", "mlp_bias", "mlp_output_bias"):
        if not getattr(config, field) and architecture in WITH_BIASES:
            yield field, "llama.cpp wants it for this architecture"
    for field in ("mlp_bias", "mlp_output_bias"):
        if getattr(config, field) and architecture in WITHOUT_FFN_BIAS:
            yield field, "llama.cpp's feed-forward network has none in this architecture"
    if (scale := GEMMA_SCALES.get(architecture)) is not None:
        own = config.head_dim**-0.5 if config.attention_scaling is None else config.attention_scaling
        if not math.isclose(own, scale.of_runtime(config), rel_tol=1e-6):
            yield "attention_scaling", f"llama.cpp multiplies by {scale.of_runtime(config):.4g} in such a model"
    if any("mlp" in getattr(layer, "skip", ()) for layer in config.per_layer_config):
        yield "per_layer_config", "llama.cpp passes over all of a layer without a feed-forward network"
    if config.lm_head_normalized:
        yield "lm_head_normalized", "llama.cpp multiplies by the head's weights as they are"
    if architecture == "command-r" and (config.qk_norm != "none") != (layers >= LAYERS_OF_COMMAND_R_WITH_NORMS):
        yield "qk_norm", f"llama.cpp has it from {LAYERS_OF_COMMAND_R_WITH_NORMS} layers on, and there always"
    if architecture in HEADS_FILL_THE_WIDTH and config.num_attention_heads * config.head_dim != config.hidden_size:
        yield "head_dim", "llama.cpp's heads are together as wide as the hidden states for this architecture"
    for parameters in map(config.rope_parameters_of, range(layers)):
        if why := _of_rotation(parameters, architecture):
            yield "rope_parameters", why


def _windows(config: VariantConfig) -> bool:
    """Whether any layer sees less than the context."""
    return "sliding_attention" in config.layer_types and config.sliding_window < config.max_position_embeddings


def _of_rotation(parameters: dict[str, Any] | None, architecture: str) -> str:
    if parameters is None:
        return ""
    kind = parameters["rope_type"]
    if kind == "dynamic" and not parameters.get("alpha"):
        return "its frequencies do not depend on the length of the text"
    if kind not in ("default", "linear", "yarn", "dynamic") and architecture not in FREQUENCY_FACTORS:
        return "llama.cpp divides no frequencies by a tensor for this architecture"
    if kind == "yarn" and architecture not in YARN_BANDS:
        moved = [name for name, usual in USUAL_BANDS.items() if (parameters.get(name) or usual) != usual]
        if moved:
            return f"llama.cpp does not read {', '.join(moved)} for this architecture"
    return "" if parameters.get("truncate", True) else "its YaRN cuts its bands at whole channels"

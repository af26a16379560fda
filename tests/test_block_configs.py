"""Models of NVIDIA's searches: against stock layers put together by hand, each with its own sizes."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_variants import VariantForCausalLM
from hf_variants.conversion import convert, from_native, to_native
from hf_variants.conversion.errors import ConversionError, NotRepresentable
from hf_variants.surgery import SelectLayers, edit
from hf_variants_cli import main
from tests.parity import hostile_


SIZES = {
    "vocab_size": 40,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "max_position_embeddings": 64,
}
IDS = torch.arange(30)[None]
# Entry -> its key/value heads and width; as NVIDIA's configs have it, every key written out.
UNUSED = {"replace_with_linear": False, "sparsify": None}
SINKS = {"num_sink_tokens": None, "unshifted_sink": False, "window_length": None}


def entry(group, factor):
    return {
        "attention": {"n_heads_in_group": group, "no_op": group is None, **UNUSED, **SINKS},
        "ffn": {"ffn_mult": factor, "no_op": factor is None, **UNUSED},
    }


DECI = [entry(2, 5.25), entry(None, 10.4), entry(4, None), entry(2, 5.25), entry(1, 17.0)]
PUZZLE = [
    {"attention": {"num_key_value_heads": 2}, "ffn": {"intermediate_size": 256}},
    {"attention": {"no_op": True}, "ffn": {"intermediate_size": 512}},
    {"attention": {"num_key_value_heads": 1}, "ffn": {"no_op": True}},
    {"attention": {"num_key_value_heads": 2}, "ffn": {"intermediate_size": 256}},
    {"attention": {"num_key_value_heads": 4}, "ffn": {"intermediate_size": 768, "hidden_act": "gelu"}},
]
HEADS, WIDTHS = (2, None, 1, 2, 4), (256, 512, None, 256, 768)


class FeedForwardAlone(nn.Module):
    """A stock layer without its attention."""

    def __init__(self, layer):
        super().__init__()
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class AttentionAlone(nn.Module):
    """A stock layer without its feed-forward network."""

    def __init__(self, layer):
        super().__init__()
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]


def by_hand(config_class, model_class, activations=()):
    """A stock model whose layers are those of models with other sizes."""
    values = SIZES | {"num_key_value_heads": 2, "intermediate_size": 256}
    model = model_class(config_class(**values))
    for number, (heads, width) in enumerate(zip(HEADS, WIDTHS)):
        own = values | {"num_key_value_heads": heads or 2, "intermediate_size": width or 256}
        own |= {"hidden_act": dict(activations).get(number, "silu")}
        layer = model_class(config_class(**own)).model.layers[number]
        model.model.layers[number] = (
            layer if heads and width else AttentionAlone(layer) if heads else FeedForwardAlone(layer)
        )
    return hostile_(model).eval()


def write(folder, model, values):
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))


def deci(model, **changes):
    values = model.config.to_dict() | {
        "model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"], "num_key_value_heads": None,
        "intermediate_size": None, "block_configs": DECI, "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
    }  # fmt: skip
    return values | changes


def test_nemotron_nas_is_stock_layers_with_their_own_sizes(tmp_path):
    native = by_hand(LlamaConfig, LlamaForCausalLM)
    write(tmp_path / "native", native, deci(native))
    report = convert(tmp_path / "native", tmp_path / "ours", verify=True)
    assert report.exactness == "bit-exact"
    ours = VariantForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(ours(IDS).logits, native(IDS, use_cache=False).logits)
    assert ours.config.to_dict()["per_layer_config"] == {
        "1": {"skip": ["self_attn"], "intermediate_size": 512},
        "2": {"skip": ["mlp"], "num_key_value_heads": 1},
        "4": {"num_key_value_heads": 4, "intermediate_size": 768},
    }
    assert main(["cost", str(tmp_path / "native")]) == 0
    generated = ours.generate(IDS, max_new_tokens=5, do_sample=False)
    longer = ours(generated[:, :-1]).logits.argmax(-1)
    assert torch.equal(generated[0, 30:], longer[0, 29:])
    with pytest.raises(NotRepresentable, match="per_layer_config"):
        to_native(ours)


@pytest.mark.parametrize("kind", [(LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
def test_puzzletron_is_a_stock_type_with_block_configs(kind, tmp_path):
    native = by_hand(*kind, activations={4: "gelu"}.items())
    write(
        tmp_path / "native",
        native,
        native.config.to_dict() | {"architectures": [kind[1].__name__], "block_configs": PUZZLE},
    )
    ours = from_native(tmp_path / "native")
    assert torch.equal(ours(IDS).logits, native(IDS, use_cache=False).logits)
    # And layers may be moved.
    edit(tmp_path / "native", tmp_path / "edited", [SelectLayers("0,2,1,4")])
    made = VariantForCausalLM.from_pretrained(tmp_path / "edited").eval()
    moved = copy.deepcopy(native)
    moved.model.layers = nn.ModuleList([native.model.layers[layer] for layer in (0, 2, 1, 4)])
    moved.config.num_hidden_layers = 4
    assert torch.equal(made(IDS).logits, moved(IDS, use_cache=False).logits)


def test_key_value_heads_as_a_list(tmp_path):
    native = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=64))
    for number, heads in enumerate((2, 4, 1, 2, 2)):
        other = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=heads, intermediate_size=64))
        native.model.layers[number] = other.model.layers[number]
    hostile_(native).eval()
    values = native.config.to_dict() | {"model_type": "deci", "num_key_value_heads": 4}
    write(tmp_path / "native", native, values | {"num_key_value_heads_per_layer": [2, 4, 1, 2, 2]})
    assert torch.equal(from_native(tmp_path / "native")(IDS).logits, native(IDS, use_cache=False).logits)


def test_layers_may_have_heads_of_queries_of_their_own(tmp_path):
    """Five heads, which do not fill the width of 48, too."""
    native = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=64))
    entries = [{"attention": {"num_attention_heads": 4, "num_key_value_heads": 2}, "ffn": {}} for _ in range(5)]
    for number, (queries, heads) in {1: (6, 3), 3: (5, 1)}.items():
        own = LlamaConfig(**SIZES, num_key_value_heads=heads, intermediate_size=64)
        own.num_attention_heads = queries
        native.model.layers[number] = LlamaForCausalLM(own).model.layers[number]
        entries[number]["attention"] = {"num_attention_heads": queries, "num_key_value_heads": heads}
    hostile_(native).eval()
    write(tmp_path / "native", native, deci(native, intermediate_size=64, block_configs=entries))
    assert torch.equal(from_native(tmp_path / "native")(IDS).logits, native(IDS, use_cache=False).logits)


@pytest.mark.parametrize(
    ("place", "part", "change", "words"),
    [
        (0, "attention", {"replace_with_linear": True}, r"block_configs\[0\].attention.replace_with_linear"),
        (3, "ffn", {"replace_with_linear": True}, r"block_configs\[3\].ffn.replace_with_linear"),
        (0, "attention", {"window_length": 128}, "window_length"),
        (0, "ffn", {"moe": {"num_local_experts": 4}}, "moe"),
        (0, "attention", {"n_heads_in_group": 3}, "n_heads_in_group.*does not divide"),
        (0, "ffn", {"ffn_mult": "wide"}, "ffn_mult"),
        (1, "ffn", {"no_op": True}, "layer 1 does nothing"),
        (0, "attention", {"no_op": True}, "first of its layer type"),
    ],
)
def test_what_no_dense_layer_has_is_refused_by_name(place, part, change, words, tmp_path):
    native = by_hand(LlamaConfig, LlamaForCausalLM)
    entries = copy.deepcopy(DECI)
    entries[place][part] |= change
    write(tmp_path / "native", native, deci(native, block_configs=entries))
    with pytest.raises(ConversionError, match=words):
        convert(tmp_path / "native", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_list_of_another_length_is_refused(tmp_path):
    native = by_hand(LlamaConfig, LlamaForCausalLM)
    write(tmp_path / "native", native, deci(native, block_configs=DECI[:4]))
    with pytest.raises(ConversionError, match="no list of 5 entries"):
        convert(tmp_path / "native", tmp_path / "ours")

"""Heads, the stream and a number of parameters: against what is defined, and stock models edited by hand."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_variants import VariantConfig, VariantForCausalLM, VariantForMaskedLM
from hf_variants.conversion import from_native, to_native
from hf_variants.surgery import Heads, HiddenSize, ParameterCount, Subject, SurgeryError, edit, edit_model
from hf_variants.surgery.subject import with_stacks
from hf_variants_cli import main
from tests.parity import hostile_, inputs_of, logits_of, random_native, relative_error
from tests.surgery_models import IDS, NAMED, ROWS, SIZES
from tests.test_surgery_vocabulary import TEXT, trained


def in_float64(model):
    """A model whose norms do not round to float32 either."""
    config = with_stacks(
        model.config,
        {
            stack: {"norm_casting_mode": "none", "ffn_output_in_float32": False}
            for stack in Subject.of_model(model).stacks
        },
    )
    made = type(model)(config).double().eval()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("model_type", NAMED)
def test_new_heads_keep_the_function_and_go_first(model_type):
    row = ROWS[model_type]
    native = random_native(row, 0)
    ours = in_float64(from_native(native))
    stacks = Subject.of_model(ours).stacks
    grow = [Heads(2 * config.num_attention_heads, name) for name, config in stacks.items()]
    first = next(iter(stacks.values()))
    if first.position_embedding_type == "alibi" or first.qk_norm == "full":
        field = "position_embedding_type" if first.position_embedding_type == "alibi" else "qk_norm"
        with pytest.raises(SurgeryError, match=field):
            edit_model(ours, grow)
        return
    wide = edit_model(ours, grow)
    batch = inputs_of(native, row.length)["long"]
    assert relative_error(logits_of(wide, batch), logits_of(ours, batch)) < 1e-9
    back = edit_model(wide, [Heads(config.num_attention_heads, name) for name, config in stacks.items()])
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), ours.state_dict().values()))


@pytest.mark.parametrize("times", [1.5, 2])
@pytest.mark.parametrize("model_type", NAMED)
def test_a_wider_stream_keeps_the_function(model_type, times):
    row = ROWS[model_type]
    native = random_native(row, 0)
    ours = in_float64(from_native(native))
    stacks = Subject.of_model(ours).stacks
    config = next(iter(stacks.values()))
    grow = HiddenSize(int(config.hidden_size * times))
    if config.norm_type == "layernorm" and times == 1.5:
        with pytest.raises(SurgeryError, match="norm_type"):
            edit_model(ours, [grow])
        return
    wide = edit_model(ours, [grow])
    assert all(stack.hidden_size == grow.size for stack in Subject.of_model(wide).stacks.values())
    batch = inputs_of(native, row.length)["long"]
    assert relative_error(logits_of(wide, batch), logits_of(ours, batch)) < 1e-9


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_placement": "post"},
        {"norm_placement": "sandwich", "norm_unit_offset": True, "qk_norm": "per_head"},
        {"norm_type": "dynamic_tanh", "learned_scale_type": "channel"},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "attention_gate": "elementwise"},
        {"position_embedding_type": "learned", "embedding_norm": True, "attention_sinks": True},
        {"embedding_size": 10, "type_vocab_size": 2},
    ],
)
def test_streams_and_heads_grow_under_other_fields(fields):
    model = in_float64(hostile_(VariantForCausalLM(VariantConfig(**SIZES, num_key_value_heads=2, **fields))))
    for operation in (HiddenSize(22), HiddenSize(32), Heads(6)):
        assert relative_error(edit_model(model, [operation])(IDS).logits, model(IDS).logits) < 1e-9


@pytest.mark.parametrize(
    "fields",
    [{"norm_type": "layernorm"}, {"ffn_sub_norm": True}, {"norm_affine": False}, {"attention_sub_norm": True}],
)
def test_norms_that_would_see_zeros_see_the_stream_again(fields):
    config = VariantConfig(**SIZES, is_causal=False, tie_word_embeddings=True, lm_head_transform=True, **fields)
    model = in_float64(hostile_(VariantForMaskedLM(config)))
    assert relative_error(edit_model(model, [HiddenSize(48)])(IDS).logits, model(IDS).logits) < 1e-9
    with pytest.raises(SurgeryError, match="multiple"):
        edit_model(model, [HiddenSize(40)])


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_heads_that_matter_most_are_kept(key_value_heads):
    native = hostile_(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=key_value_heads))).eval()
    config = copy.deepcopy(native.config)
    config.num_attention_heads, config.head_dim = 2, 4
    own = key_value_heads == 4
    config.num_key_value_heads = 2
    by_hand = LlamaForCausalLM(config).eval()
    state = native.state_dict()
    for layer in range(2):
        q, k, v, o = (f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkvo")
        values = state[v].view(key_value_heads, 4, 16).repeat_interleave(4 // key_value_heads, 0).square().sum(2)
        score = (state[o].square().sum(0).view(4, 4) * values).sum(1)
        # The best two, or the better one of each pair.
        heads = (
            score.argsort(descending=True)[:2].sort().values
            if own
            else score.view(2, 2).argmax(1) + torch.tensor([0, 2])
        )
        rows = (heads[:, None] * 4 + torch.arange(4)).flatten()
        state |= {q: state[q][rows], o: state[o][:, rows]}
        if own:
            state |= {k: state[k][rows], v: state[v][rows]}
    by_hand.load_state_dict(state)
    made = to_native(edit_model(from_native(native), [Heads(2)]), "llama")
    assert torch.equal(made(IDS).logits, by_hand(IDS).logits)


@pytest.fixture
def with_tokenizer(tmp_path):
    """A stock model's folder with a tokenizer, the ids of a text, and the text's file."""
    tokenizer = trained("byte bpe")
    native = hostile_(LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)}))).eval()
    native.save_pretrained(tmp_path / "native")
    tokenizer.save_pretrained(tmp_path / "native")
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False).input_ids])
    return native, ids, tmp_path / "native", tmp_path / "text"


@torch.no_grad()
def squares_in(native, ids, modules, output=False):
    """Mean squares of every channel that goes into modules, or comes out of them."""
    seen = {}
    hooks = [
        module.register_forward_hook(
            lambda m, i, o, name=name: seen.update(
                {name: (o if output else i[0]).double().square().flatten(0, -2).mean(0)}
            )
        )
        for name, module in modules.items()
    ]
    native(ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("what", ["heads", "channels"])
def test_heads_and_inner_channels_are_chosen_by_a_text(what, with_tokenizer, tmp_path):
    native, ids, folder, text = with_tokenizer
    config, state = copy.deepcopy(native.config), native.state_dict()
    part = "self_attn.o_proj" if what == "heads" else "mlp.down_proj"
    seen = squares_in(native, ids, {n: layer.get_submodule(part) for n, layer in enumerate(native.model.layers)})
    for n, squares in seen.items():
        name = f"model.layers.{n}."
        out = f"{name}{part}.weight"
        if what == "heads":
            score = (squares * state[out].double().square().sum(0)).view(4, 4).sum(1)
            kept = (score.argsort(descending=True)[:2].sort().values[:, None] * 4 + torch.arange(4)).flatten()
            inner = [f"{name}self_attn.{part}_proj.weight" for part in "qkv"]
        else:
            kept = (squares.sqrt() * state[out].double().norm(dim=0)).argsort(descending=True)[:10].sort().values
            inner = [f"{name}mlp.{part}_proj.weight" for part in ("gate", "up")]
        state |= {out: state[out][:, kept]} | {each: state[each][kept] for each in inner}
    if what == "heads":
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 2, 4
    else:
        config.intermediate_size = 10
    by_hand = LlamaForCausalLM(config).eval()
    by_hand.load_state_dict(state)
    option = ["--heads", "2"] if what == "heads" else ["--ffn-width", "10"]
    command = ["edit", str(folder), str(tmp_path / "ours"), *option, "--text", str(text)]
    assert main([*command, "--native", str(tmp_path / "back")]) == 0
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "back")(ids).logits, by_hand(ids).logits)


def test_channels_of_the_stream_are_chosen_by_a_text(with_tokenizer, tmp_path):
    native, ids, folder, text = with_tokenizer
    norms = {name: m for name, m in native.named_modules() if name.endswith("norm")}
    seen = squares_in(native, ids, norms, output=True)
    score = sum(s.sqrt() / s.sqrt().sum() for s in seen.values())
    best = score.argsort(descending=True)[:12].sort().values
    config = copy.deepcopy(native.config)
    config.hidden_size, config.head_dim = 12, 4
    by_hand = LlamaForCausalLM(config).eval()
    shapes = {name: tensor.shape for name, tensor in by_hand.state_dict().items()}
    state = native.state_dict()
    for name, tensor in state.items():
        for dim, (was, becomes) in enumerate(zip(tensor.shape, shapes[name])):
            state[name] = state[name].index_select(dim, best) if was != becomes else state[name]
    by_hand.load_state_dict(state)
    report = edit(folder, tmp_path / "ours", [HiddenSize(12, text)], native=tmp_path / "back", text=TEXT)
    assert report.text is not None
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "back")(ids).logits, by_hand(ids).logits)


@pytest.mark.parametrize("layers", [None, {1: {"qk_norm": "head"}}, {1: {"num_key_value_heads": 1}}])
def test_a_number_of_parameters(layers):
    model = VariantForCausalLM(VariantConfig(**SIZES | {"intermediate_size": 100, "per_layer_config": layers}))
    total = sum(p.numel() for p in model.parameters())
    for count in (total - 1000, total + 1000):
        made = edit_model(model, [ParameterCount(count)])
        # 8 channels of a gated network in each of two layers.
        assert count - 8 * 3 * 16 * 2 < sum(p.numel() for p in made.parameters()) <= count
    with pytest.raises(SurgeryError, match="one channel"):
        edit_model(model, [ParameterCount(100)])


def test_refusals():
    for operation, fields, words in (
        (Heads(3), {"num_key_value_heads": 2}, "multiple of 2"),
        (Heads(0), {}, "evenly"),
        (Heads(8), {"attention_sub_norm": True}, "attention_sub_norm"),
        (HiddenSize(0), {}, "0 channels"),
        (HiddenSize(8), {}, "--text"),
        (HiddenSize(24), {"position_embedding_type": "sinusoidal"}, "position_embedding_type"),
    ):
        model = VariantForCausalLM(VariantConfig(**SIZES, **fields))
        with pytest.raises(SurgeryError, match=words):
            edit_model(model, [operation])

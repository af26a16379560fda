"""Other norms: LayerNorm as RMSNorm, and new norms and scales, against what is defined."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_variants import VariantConfig, VariantForCausalLM, VariantForConditionalGeneration, VariantSeq2SeqConfig
from hf_variants.conversion import from_native
from hf_variants.surgery import AddLayerScale, AddNorms, Subject, SurgeryError, ToRMSNorm, edit, edit_model
from hf_variants_cli import main
from tests.parity import hostile_, inputs_of, logits_of, random_native, relative_error
from tests.surgery_models import IDS, NAMED, ROWS, SIZES
from tests.test_surgery_sizes import in_float64
from tests.test_surgery_vocabulary import TEXT, trained


LAYER_NORM = {"norm_type": "layernorm"}


@pytest.mark.parametrize("model_type", NAMED)
def test_layer_norm_becomes_rms_norm_or_is_refused_by_name(model_type):
    row = ROWS[model_type]
    native = random_native(row, 0)
    ours = from_native(native).double()
    config = next(iter(Subject.of_model(ours).stacks.values()))
    if model_type == "gpt2":
        made = in_float64(edit_model(ours, [ToRMSNorm()]))
        assert made.config.norm_type == "rmsnorm"
        batch = inputs_of(native, row.length)["long"]
        assert relative_error(logits_of(made, batch), logits_of(ours, batch)) < 1e-9
        return
    field = (
        "norm_type"
        if config.norm_type != "layernorm"
        else "embedding_norm"
        if model_type == "bloom"
        else "norm_placement"
    )
    with pytest.raises(SurgeryError, match=field):
        edit_model(ours, [ToRMSNorm()])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"norm_bias": False, "parallel_block": "shared_norm"},
        {"parallel_block": "two_norms", "qk_norm": "head"},
        {"norm_unit_offset": True, "position_embedding_type": "learned", "type_vocab_size": 2},
        {"embedding_size": 8, "residual_multiplier": 0.5},
        {"per_layer_config": {1: {"skip": ["attention"]}}},
    ],
)
def test_layer_norm_becomes_rms_norm_under_other_fields(fields):
    model = hostile_(VariantForCausalLM(VariantConfig(**SIZES, **LAYER_NORM, **fields))).double().eval()
    assert relative_error(in_float64(edit_model(model, [ToRMSNorm()]))(IDS).logits, model(IDS).logits) < 1e-9


def test_encoder_decoders_read_the_encoders_last_norm():
    stack = SIZES | LAYER_NORM
    config = VariantSeq2SeqConfig(encoder=stack, decoder=stack, tie_word_embeddings=True, share_embeddings=True)
    model = hostile_(VariantForConditionalGeneration(config)).double().eval()
    arguments = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
    made = in_float64(edit_model(model, [ToRMSNorm()]))
    assert relative_error(made(**arguments).logits, model(**arguments).logits) < 1e-9


@pytest.mark.parametrize("native", [
    (GPT2Config, GPT2LMHeadModel, {"n_embd": 16, "n_head": 4, "n_layer": 2}),
    (GPTNeoXConfig, GPTNeoXForCausalLM, SIZES),
])  # fmt: skip
def test_a_folder_becomes_one_with_rms_norms(native, tmp_path):
    config_class, model_class, sizes = native
    model = hostile_(model_class(config_class(**sizes | {"vocab_size": 40}))).eval()
    model.save_pretrained(tmp_path / "native")
    assert main(["edit", str(tmp_path / "native"), str(tmp_path / "ours"), "--to-rmsnorm"]) == 0
    made = VariantForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert relative_error(made(IDS).logits, model(IDS).logits) < 1e-4


@pytest.mark.parametrize("model_type", NAMED)
def test_learned_scales_change_no_bit(model_type):
    row = ROWS[model_type]
    native = random_native(row, 0)
    ours = from_native(native)
    made = edit_model(ours, [AddLayerScale()])
    batch = inputs_of(native, row.length)["long"]
    assert relative_error(logits_of(made, batch), logits_of(ours, batch)) < 1e-6
    scales = [tensor for name, tensor in made.state_dict().items() if name.endswith(".scale")]
    assert scales
    if all(config.residual_multiplier == 1 for config in Subject.of_model(ours).stacks.values()):
        assert torch.equal(logits_of(made, batch), logits_of(ours, batch))


@pytest.mark.parametrize("kind", ["qk", "sandwich"])
def test_new_norms_have_the_sizes_that_they_find(kind, tmp_path):
    tokenizer = trained("byte bpe")
    native = hostile_(
        LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)}, num_key_value_heads=2))
    ).eval()
    native.save_pretrained(tmp_path / "native")
    tokenizer.save_pretrained(tmp_path / "native")
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False).input_ids])
    seen = {}
    for name, module in native.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.double()}))
    with torch.no_grad():
        expected = native(ids).logits
    edit(tmp_path / "native", tmp_path / "ours", [AddNorms(kind, tmp_path / "text")])
    made = VariantForCausalLM.from_pretrained(tmp_path / "ours").eval()
    state = made.state_dict()
    for layer in range(2):
        name = f"model.layers.{layer}."
        if kind == "qk":
            sizes = seen[f"{name}self_attn.k_proj"].view(-1, 2, 4).square().mean((0, 2)).sqrt()
            assert torch.allclose(state[f"{name}self_attn.k_norm.weight"], sizes[:, None].expand(2, 4).float())
        else:
            size = seen[f"{name}mlp.down_proj"].square().mean().sqrt()
            assert torch.allclose(state[f"{name}mlp_branch_norm.weight"], size.float().expand(16))
    # Nearer than with norms of ones.
    ones = VariantForCausalLM(made.config).eval()
    fresh = [name for name in state if name not in from_native(native).state_dict()]
    ones.load_state_dict(state | {name: torch.ones_like(state[name]) for name in fresh})
    with torch.no_grad():
        distances = [torch.nn.functional.mse_loss(model(ids).logits, expected).item() for model in (made, ones)]
    assert distances[0] < distances[1]


def test_refusals():
    for operation, fields, words in (
        (ToRMSNorm(), LAYER_NORM | {"norm_placement": "post"}, "norm_placement"),
        (ToRMSNorm(), LAYER_NORM | {"ffn_sub_norm": True}, "ffn_sub_norm"),
        (ToRMSNorm(), LAYER_NORM | {"attention_gate": "headwise"}, "attention_gate"),
        (ToRMSNorm(), {}, "norm_type"),
        (AddNorms("qk"), {}, "--text"),
        (AddNorms("qk", "a text"), {"qk_norm": "head"}, "qk_norm"),
        (AddNorms("sandwich", "a text"), {"norm_placement": "post"}, "norm_placement"),
        (AddNorms("post", "a text"), {}, "qk or sandwich"),
        (AddLayerScale(), {"learned_scale_type": "scalar"}, "learned_scale_type"),
    ):
        model = VariantForCausalLM(VariantConfig(**SIZES, **fields))
        with pytest.raises(SurgeryError, match=words):
            edit_model(model, [operation])

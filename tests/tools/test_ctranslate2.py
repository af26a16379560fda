"""CTranslate2 on exported models: the same scores and tokens as ours, or a refusal by field; and what its check catches."""

import pytest
import torch

from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForConditionalGeneration,
    VariantForMaskedLM,
    VariantSeq2SeqConfig,
    presets,
)
from hf_variants.conversion import NotRepresentable, VerificationFailed, from_native
from hf_variants.conversion.engines import ctranslate2, export_to_engine
from hf_variants.conversion.engines.export import in_float32
from tests.native_rows import all_rows
from tests.parity import hostile_, random_native

from . import kinds


ENGINE = pytest.mark.tool("CTranslate2: export --engine", package="ctranslate2")
pytestmark = pytest.mark.whole


def exported(model, folder, quantization=None, reference=None):
    """What the engine's check says of an exported model, compared with `reference` or itself."""
    folder.mkdir()
    ctranslate2.write(model, None, folder, quantization)
    checks, _ = ctranslate2.prove(folder, in_float32(reference or model), None, quantization)
    return checks


def failed(checks):
    assert checks
    return [f"{check.name}: {check.detail}" for check in checks if not check.ok]


def variant(fields, seed=0):
    """A model of a config with weights that hide nothing."""
    config = fields if isinstance(fields, VariantSeq2SeqConfig) else VariantConfig(**fields)
    torch.manual_seed(seed)
    if config.is_encoder_decoder:
        built = VariantForConditionalGeneration(config)
    else:
        built = (VariantForCausalLM if config.is_causal else VariantForMaskedLM)(config)
    return hostile_(built, seed).eval()


@ENGINE
@pytest.mark.parametrize("kind", [kind for kind in kinds.KINDS if kind != "gemma2"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_folder_runs_and_has_its_tokenizer(kind, quantization, tmp_path):
    model, tokenizer = kinds.model(kind), kinds.tokenizer()
    model.save_pretrained(tmp_path / "variant")
    tokenizer.save_pretrained(tmp_path / "variant")
    report = export_to_engine(tmp_path / "variant", tmp_path / "engine", "ctranslate2", quantization=quantization)
    assert report.checks
    assert report.ok
    assert (tmp_path / "engine" / "tokenizer.json").is_file()
    if kind in kinds.DECODERS:
        # As its users call it: text in, text out.
        import ctranslate2 as engine
        from transformers import AutoTokenizer

        read = AutoTokenizer.from_pretrained(tmp_path / "engine")
        text = "the cat sees a red bird"
        generator = engine.Generator(str(tmp_path / "engine"), compute_type="default" if quantization else "float32")
        prompt = read.convert_ids_to_tokens(read(text)["input_ids"])
        made = generator.generate_batch([prompt], max_length=8, sampling_topk=1, include_prompt_in_result=False)[0]
        ours = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8, do_sample=False)[0]
        expected = [index for index in ours[len(prompt) :].tolist() if index != tokenizer.eos_token_id]
        if quantization is None:
            assert made.sequences_ids[0] == expected


@pytest.mark.tool("CTranslate2: export --engine", package="ctranslate2", refused=True)
@pytest.mark.parametrize("kind", ["gemma2"])
def test_what_the_engine_would_drop_is_refused(kind, tmp_path):
    kinds.model(kind).save_pretrained(tmp_path / "variant")
    with pytest.raises(NotRepresentable, match="`attn_logit_softcapping`"):
        export_to_engine(tmp_path / "variant", tmp_path / "engine", "ctranslate2")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("model_type", all_rows())
def test_every_native_type_runs_alike_or_is_refused(model_type, tmp_path):
    outcomes = []
    for seed in range(3):
        model = from_native(random_native(all_rows()[model_type], seed), dtype=torch.float32)
        try:
            ctranslate2.refuse_unrepresentable(model.config)
        except NotRepresentable as refusal:
            outcomes.append(refusal.fields)
            continue
        outcomes.append(failed(exported(model, tmp_path / str(seed))))
    assert all(isinstance(outcome, dict) or not outcome for outcome in outcomes), outcomes


@pytest.mark.parametrize("name", presets())
def test_every_preset_runs_alike_or_is_refused(name, tmp_path):
    sizes = {**kinds.SIZES, "num_hidden_layers": 3}
    model = variant(VariantConfig.from_preset(name, **sizes).to_dict() | {"model_type": "hf_variant"})
    refused = {"deepnorm", "exaone4", "gemma2", "nanochat", "nemotron", "olmo2", "olmo3"}
    if name in refused:
        with pytest.raises(NotRepresentable):
            ctranslate2.refuse_unrepresentable(model.config)
        return
    ctranslate2.refuse_unrepresentable(model.config)
    assert not failed(exported(model, tmp_path / "engine"))


BASE = {**kinds.SIZES, "num_key_value_heads": 2, "head_dim": 10, "norm_eps": 1e-5}
ENCODER = {
    **BASE, "is_causal": False, "norm_type": "layernorm", "norm_placement": "post", "ffn_type": "mlp",
    "hidden_act": "gelu", "position_embedding_type": "learned", "type_vocab_size": 2,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 100.0}


def pair(**of_decoder):
    stack = {**BASE, "norm_type": "layernorm", "position_embedding_type": "sinusoidal"}
    encoder, decoder = of_decoder.pop("encoder", {}), of_decoder.pop("decoder", {})
    return VariantSeq2SeqConfig(
        encoder={**stack, **encoder}, decoder={**stack, **decoder}, decoder_start_token_id=1,
        share_embeddings=False, tie_word_embeddings=False, **of_decoder,
    )  # fmt: skip


# A feature -> the config that has it, and the same without it, of which the weights that both have are equal.
FEATURES = {
    "norm kind": ({**BASE, "norm_type": "layernorm"}, {**BASE, "norm_type": "rmsnorm"}),
    "1 + w": ({**BASE, "norm_unit_offset": True}, BASE),
    "1 + w of LayerNorm": (
        {**BASE, "norm_type": "layernorm", "norm_unit_offset": True},
        {**BASE, "norm_type": "layernorm"},
    ),
    "epsilon": ({**BASE, "norm_eps": 1e-1}, BASE),
    "norm place": ({**BASE, "norm_placement": "post"}, {**BASE, "final_norm": False}),
    "sandwich": ({**BASE, "norm_placement": "sandwich"}, BASE),
    "final norm": ({**BASE, "norm_placement": "post", "final_norm": True}, {**BASE, "norm_placement": "post"}),
    "no final norm": ({**BASE, "final_norm": False}, BASE),
    "embedding norm": ({**BASE, "embedding_norm": True}, BASE),
    "parallel": ({**BASE, "parallel_block": "two_norms"}, BASE),
    "shared norm": ({**BASE, "parallel_block": "shared_norm"}, {**BASE, "parallel_block": "two_norms"}),
    "residual multiplier": ({**BASE, "residual_multiplier": 0.3}, BASE),
    "residual multiplier in a sandwich": (
        {**BASE, "norm_placement": "sandwich", "residual_multiplier": 0.3},
        {**BASE, "norm_placement": "sandwich"},
    ),
    "learned scale": ({**BASE, "learned_scale_type": "channel", "layer_scale_init": 0.3, "mlp_bias": True}, BASE),
    "GLU": (BASE, {**BASE, "ffn_type": "mlp"}),
    "activation": ({**BASE, "hidden_act": "quick_gelu"}, {**BASE, "hidden_act": "silu"}),
    "biases": ({**BASE, "attention_bias": True, "mlp_bias": True}, BASE),
    "output bias alone": ({**BASE, "attention_output_bias": True}, BASE),
    "QK-norm": ({**BASE, "qk_norm": "head"}, BASE),
    "QK-norm of another kind": (
        {**BASE, "qk_norm": "head", "qk_norm_type": "layernorm", "qk_norm_bias": True},
        {**BASE, "qk_norm": "head"},
    ),
    "QK-norm without weights": ({**BASE, "qk_norm": "head", "qk_norm_affine": False}, BASE),
    "scaling": ({**BASE, "attention_scaling": 0.9}, BASE),
    "scaling by layer": ({**BASE, "scale_attn_by_inverse_layer_idx": True}, BASE),
    "learned positions": ({**BASE, "position_embedding_type": "learned"}, {**BASE, "position_embedding_type": "none"}),
    "offset of positions": (
        {**BASE, "position_embedding_type": "sinusoidal", "position_offset": 2},
        {**BASE, "position_embedding_type": "sinusoidal"},
    ),
    "layout of sinusoids": (
        {**BASE, "position_embedding_type": "sinusoidal", "sinusoidal_layout": "half"},
        {**BASE, "position_embedding_type": "sinusoidal"},
    ),
    "ALiBi": ({**BASE, "position_embedding_type": "alibi"}, {**BASE, "position_embedding_type": "none"}),
    "ALiBi divided": (
        {**BASE, "position_embedding_type": "alibi", "alibi_divisor": 10**0.5},
        {**BASE, "position_embedding_type": "alibi"},
    ),
    "no positions": ({**BASE, "position_embedding_type": "none"}, BASE),
    "theta": ({**BASE, "rope_parameters": ROPE}, BASE),
    "interleaved": ({**BASE, "rope_interleaved": True}, BASE),
    "reversed": ({**BASE, "rope_reversed": True}, BASE),
    "partial rotation": ({**BASE, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.4}},
                         {**BASE, "rope_parameters": ROPE}),
    "linear": ({**BASE, "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}},
               {**BASE, "rope_parameters": ROPE}),
    "yarn": (
        {**BASE, "rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {**BASE, "rope_parameters": ROPE},
    ),
    "llama3": (
        {**BASE, "rope_parameters": {**ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                     "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
        {**BASE, "rope_parameters": ROPE},
    ),
    "proportional": (
        {**BASE, "rope_parameters": {**ROPE, "rope_type": "proportional", "partial_rotary_factor": 0.4}},
        {**BASE, "rope_parameters": ROPE},
    ),
    "rotation per layer type": (
        {**BASE, "layer_types": "SF", "sliding_window": 128,
         "rope_parameters": {"full_attention": ROPE, "sliding_attention": {**ROPE, "rope_theta": 9000.0}}},
        {**BASE, "rope_parameters": ROPE},
    ),
    "layers without rotation": ({**BASE, "no_rope_layers": [0, 1]}, BASE),
    "theta per layer": ({**BASE, "layer_rope_theta": [0, 50.0]}, BASE),
    "embedding multiplier": ({**BASE, "embedding_multiplier": 4.5}, BASE),
    "factorised embedding": (
        {**BASE, "embedding_size": 20, "embedding_projection_bias": True},
        {**BASE, "embedding_size": 20},
    ),
    "projection before the head": (
        {**BASE, "embedding_size": 20, "output_projection": True, "embedding_projection_bias": True},
        {**BASE, "embedding_size": 20, "output_projection": True},
    ),
    "logit scale": ({**BASE, "logit_scale": 0.3, "lm_head_bias": True}, {**BASE, "lm_head_bias": True}),
    "head bias": ({**BASE, "lm_head_bias": True}, BASE),
    "scale before the head": ({**BASE, "lm_head_input_scale": 0.3, "lm_head_bias": True}, {**BASE, "lm_head_bias": True}),
    "normalised head": ({**BASE, "lm_head_normalized": True}, BASE),
    "soft-cap of the logits": ({**BASE, "final_logit_softcapping": 3.0}, BASE),
    "layers that differ": (
        {**BASE, "per_layer_config": {1: {"num_key_value_heads": 1, "intermediate_size": 24, "attention_bias": True}}},
        {**BASE, "per_layer_config": {1: {"num_key_value_heads": 1, "intermediate_size": 24}}},
    ),
    "encoder": (ENCODER, {**ENCODER, "norm_type": "rmsnorm"}),
    "encoder, token types": (ENCODER, {**ENCODER, "type_vocab_size": 0}),
    "encoder, multiplier beside types": ({**ENCODER, "embedding_multiplier": 4.5}, ENCODER),
    "encoder, sandwich": ({**ENCODER, "norm_placement": "sandwich"}, {**ENCODER, "norm_placement": "pre"}),
    "encoder, rotation": (
        {**ENCODER, "position_embedding_type": "rope", "rope_parameters": ROPE},
        {**ENCODER, "position_embedding_type": "none"},
    ),
    "encoder, relative bias": (
        {**ENCODER, "position_embedding_type": "relative_bias"},
        {**ENCODER, "position_embedding_type": "none"},
    ),
    "encoder, factorised": (
        {**ENCODER, "embedding_size": 20, "embedding_projection_bias": True, "embedding_multiplier": 2.5},
        {**ENCODER, "embedding_size": 20, "embedding_projection_bias": True},
    ),
    "encoder, positions behind padding": (
        {**ENCODER, "position_ids_source": "input_ids", "position_offset": 0},
        ENCODER,
    ),
    "pooler": ({**ENCODER, "pooler": True}, ENCODER),
    "pair": (pair(), pair(decoder={"norm_placement": "post"})),
    "pair, final bias": (pair(final_logits_bias=True), pair()),
    "pair, sandwich": (pair(decoder={"norm_placement": "sandwich"}), pair()),
    "pair, one key/value head": (
        pair(decoder={"num_key_value_heads": 1, "residual_multiplier": 0.4}),
        pair(decoder={"num_key_value_heads": 1}),
    ),
    "pair, relative biases": (
        pair(encoder={"position_embedding_type": "relative_bias"}, decoder={"position_embedding_type": "relative_bias"}),
        pair(encoder={"position_embedding_type": "relative_bias"}, decoder={"position_embedding_type": "none"}),
    ),
    "pair, widths": (
        pair(encoder={"hidden_size": 24}),
        pair(encoder={"hidden_size": 24}, decoder={"attention_scaling": 0.9}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_exported_and_missed_where_it_is_off(feature, tmp_path):
    """The mutation: the same weights written without the feature do not pass for the model that has it."""
    on, off = (variant(fields) for fields in FEATURES[feature])
    ctranslate2.refuse_unrepresentable(on.config)
    ctranslate2.refuse_unrepresentable(off.config)
    given = {name: tensor for name, tensor in on.state_dict().items() if name in off.state_dict()
             and off.state_dict()[name].shape == tensor.shape}  # fmt: skip
    off.load_state_dict(given, strict=False)
    assert failed(exported(off, tmp_path / "off", reference=on))
    assert not failed(exported(on, tmp_path / "on"))


def test_nothing_is_left_of_an_export_that_differs(tmp_path, monkeypatch):
    kinds.model("llama").save_pretrained(tmp_path / "variant")
    build_spec = ctranslate2.build_spec

    def wrong(model):
        spec = build_spec(model)
        spec.decoder.layer[1].self_attention.rotary_interleave = True
        return spec

    monkeypatch.setattr(ctranslate2, "build_spec", wrong)
    with pytest.raises(VerificationFailed, match="scores of"):
        export_to_engine(tmp_path / "variant", tmp_path / "engine", "ctranslate2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["variant"]


def test_half_precision_is_written_as_it_is_stored(tmp_path):
    model = kinds.model("llama", residual_multiplier=0.3).bfloat16()
    model.save_pretrained(tmp_path / "variant")
    assert export_to_engine(tmp_path / "variant", tmp_path / "engine", "ctranslate2").ok
    small, large = ((tmp_path / "engine").joinpath("model.bin").stat().st_size, 4 * model.num_parameters())
    assert small < 0.8 * large


def test_unknown_quantizations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="int8_float16"):
        export_to_engine(tmp_path, tmp_path / "engine", "ctranslate2", quantization="int4")

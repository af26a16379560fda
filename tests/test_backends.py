"""Every attention backend computes the config's features, or refuses them in a sentence; none drops one silently."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_variants import VariantConfig, VariantForCausalLM, VariantModel


SIZES = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 64,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FEATURES = {
    "softcap": {"attn_logit_softcapping": 2.0},
    "sinks": {"attention_sinks": True},
    "alibi": {"position_embedding_type": "alibi"},
    "relative": {"position_embedding_type": "relative_bias"},
}
FIELDS = {
    "softcap": "attn_logit_softcapping", "sinks": "attention_sinks", "alibi": "position_embedding_type",
    "relative": "position_embedding_type",
}  # fmt: skip
REFUSED = [
    ("softcap", "sdpa"), ("sinks", "sdpa"), ("sinks", "flash_attention_2"), ("sinks", "flash_attention_3"),
    ("sinks", "kernels-community/flash-attn2"), ("alibi", "flash_attention_2"), ("relative", "flash_attention_2"),
    ("alibi", "kernels-community/vllm-flash-attn3"),
]  # fmt: skip


def build(implementation=None, model_class=VariantForCausalLM, **fields):
    torch.manual_seed(0)
    config = VariantConfig(**{**SIZES, **fields})
    options = {} if implementation is None else {"attn_implementation": implementation}
    model = model_class._from_config(config, **options).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "sinks" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def ids(batch=2, length=12):
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("feature", "implementation"), REFUSED)
def test_an_unable_backend_is_refused_by_the_fields_name(feature, implementation):
    with pytest.raises(ValueError, match=rf"{implementation} cannot compute `{FIELDS[feature]}`.* Use one of .*eager"):
        build(implementation, **FEATURES[feature])


@pytest.mark.parametrize(("feature", "implementation"), REFUSED)
def test_an_unable_backend_cannot_be_switched_on_later(feature, implementation):
    model = build("eager", **FEATURES[feature])
    with pytest.raises(ValueError, match=f"`{FIELDS[feature]}`"):
        model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == "eager"


def test_a_feature_of_one_layer_counts():
    with pytest.raises(ValueError, match="`attn_logit_softcapping`"):
        build("sdpa", per_layer_config={1: {"attn_logit_softcapping": 2.0}})


@pytest.mark.parametrize("feature", ["softcap", "sinks"])
def test_the_default_falls_back_to_eager_and_says_so(feature, caplog):
    from hf_variants.model import modeling_variant

    modeling_variant.logger.warning_once.__func__.cache_clear()
    with caplog.at_level("WARNING"):
        modeling_variant.logger.propagate = True
        model = build(**FEATURES[feature])
    assert model.config._attn_implementation == "eager"
    assert f"`{FIELDS[feature]}`" in caplog.text


@pytest.mark.parametrize("feature", ["alibi", "relative"])
def test_the_default_is_sdpa_where_it_can(feature):
    assert build(**FEATURES[feature]).config._attn_implementation == "sdpa"
    assert build().config._attn_implementation == "sdpa"


CASES = {
    "plain": {},
    "grouped with window": {"layer_types": "SF", "sliding_window": 4},
    "scaling": {"attention_scaling": 0.7},
    "alibi": {"position_embedding_type": "alibi"},
    "alibi with window": {"position_embedding_type": "alibi", "layer_types": "SF", "sliding_window": 4},
    "relative": {"position_embedding_type": "relative_bias", "relative_attention_per_layer": True},
    "encoder": {"is_causal": False},
    "encoder with window": {"is_causal": False, "layer_types": "SF", "sliding_window": 3},
    "encoder with relative bias": {"is_causal": False, "position_embedding_type": "relative_bias"},
    "qk norm and gate": {"qk_norm": "head", "attention_gate": "elementwise"},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_sdpa_equals_eager(case, padded):
    model = build("eager", VariantModel, **CASES[case])
    mask = torch.ones(2, 12, dtype=torch.long)
    if padded:
        mask[0, :4] = 0
    real = mask.bool()
    expected = model(ids(), attention_mask=mask).last_hidden_state[real]
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
    out = model(ids(), attention_mask=mask).last_hidden_state[real]
    assert (out - expected).abs().max() < 1e-5 * expected.std()
    model.set_attn_implementation("eager")
    assert torch.equal(model(ids(), attention_mask=mask).last_hidden_state[real], expected)


@pytest.mark.parametrize("case", [*CASES, "softcap", "sinks"])
def test_a_mask_of_what_is_seen_is_no_summand(case):
    """A 4D mask of booleans or whole numbers, which eager attention of stock classes adds as 0 and 1."""
    fields = CASES[case] if case in CASES else FEATURES[case]
    seen = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(4)) < 0.6
    seen |= torch.eye(12, dtype=torch.bool)
    lowest = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for implementation in ("eager", "sdpa") if case in CASES else ("eager",):
        model = build(implementation, VariantModel, **fields)
        expected = model(ids(), attention_mask=lowest).last_hidden_state
        for mask in (seen, seen.long())[: 2 if implementation == "eager" else 1]:
            out = model(ids(), attention_mask=mask).last_hidden_state
            assert (out - expected).abs().max() < 1e-5 * expected.std()
            of_layers = model(ids(), attention_mask=dict.fromkeys(model.layer_types, mask)).last_hidden_state
            assert torch.equal(of_layers, out)


# Without compiling, and compiled.
STANCES = ["force_eager", pytest.param("default", marks=[pytest.mark.compiler, pytest.mark.slow, pytest.mark.whole])]


@pytest.mark.parametrize("stance", STANCES)
@torch.no_grad()
def test_flex_equals_eager(stance):
    # One test for all, and one kind of layer where each takes compilations. Flex attention works in blocks of 128 tokens;
    # here are two.
    layers = "SF" if stance == "force_eager" else "S"
    model = build("eager", VariantModel, layer_types=layers, num_hidden_layers=len(layers), sliding_window=40,
                  **FEATURES["softcap"], **FEATURES["alibi"])  # fmt: skip
    tokens = ids(1, 130)
    expected = model(tokens).last_hidden_state
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance(stance):
        out = model(tokens).last_hidden_state
        assert (out - expected).abs().max() < 1e-5 * expected.std()

        model.layers[0].self_attn.attention_dropout = 0.1
        assert torch.equal(model(tokens).last_hidden_state, out)
        with pytest.raises(ValueError, match="does not support `dropout`"):
            model.train()(tokens)


def test_attention_weights_come_from_eager_only():
    model = build("eager", **FEATURES["softcap"])
    weights = model(ids(), output_attentions=True).attentions
    assert len(weights) == 2
    assert all(weight.shape == (2, 4, 12, 12) for weight in weights)
    assert torch.allclose(weights[0].sum(-1), torch.ones(2, 4, 12))
    assert not build("sdpa")(ids(), output_attentions=True).attentions


# Continuous batching. A small cache: the default one takes the machine's free memory.


def generate_in_batches(model, prompts, new_tokens):
    """Tokens and error of every prompt."""
    outputs = model.generate_batch(
        [prompt.tolist() for prompt in prompts],
        generation_config=GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
    )
    return [(output.generated_tokens, output.error) for output in outputs.values()]


@pytest.mark.parametrize("case", [
    {}, {"layer_types": "SF", "sliding_window": 4}, {"position_embedding_type": "learned"},
    {"parallel_block": "shared_norm", "qk_norm": "head"}, {"attention_sinks": True},
], ids=str)  # fmt: skip
def test_continuous_batching_equals_generate(case):
    model = build(**case)
    prompts = [ids(1, 11)[0], ids(1, 5)[0]]
    expected = [
        model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=6, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        for prompt in prompts
    ]
    assert generate_in_batches(model, prompts, 6) == [(tokens, None) for tokens in expected]


@pytest.mark.parametrize("feature", ["softcap", "alibi", "relative"])
def test_continuous_batching_refuses_what_it_would_ignore(feature):
    model = build(**FEATURES[feature])
    sentence = rf"Continuous batching ignores `{FIELDS[feature]}`.* Use `generate`"
    with pytest.raises(ValueError, match=sentence):
        model.generate_batch([[1, 2, 3]])
    # A server that batches by itself gets no further.
    with pytest.raises(ValueError, match=sentence):
        model(ids(), cache=object())


@pytest.mark.parametrize("feature", FEATURES)
def test_features_change_the_output(feature):
    """Else the tests above would prove nothing."""
    plain, model = build("eager"), build("eager", **FEATURES[feature])
    model.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(plain(ids()).logits, model(ids()).logits, atol=1e-2)


def test_encoder_windows_are_inclusive_for_flash_attention():
    """transformers gives FlashAttention `sliding_window - 1` tokens per side; its masks keep `sliding_window`."""
    seen = []

    def record(module, query, key, value, attention_mask, sliding_window=None, **kwargs):
        seen.append(sliding_window)
        return query.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("recorder", record)
    for causal in (True, False):
        model = build("recorder", VariantModel, is_causal=causal, layer_types="SF", sliding_window=5)
        model(ids())
    assert seen == [5, None, 6, None]

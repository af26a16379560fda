"""What must hold for every config: each preset, and configs drawn from the whole decoder space."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_variants import VariantConfig, VariantForCausalLM
from hf_variants.model.configuration_variant import FIELDS
from hf_variants.presets import PRESETS
from tests.strategies import VOCAB, hostile_, variant_fields


# float32 rounds at 6e-8, and some 30 operations per layer with hostile weights amplify it: 2e-6 of the logits'
# standard deviation is usual where two orders of the same sums are compared, and the rest is head room. A wrong mask,
# position or scale is off by 1e-2 or more.
TOLERANCE = 1e-4

LENGTH = 14


def build(config: VariantConfig, implementation: str = "eager") -> VariantForCausalLM:
    model = VariantForCausalLM._from_config(config, attn_implementation=implementation)
    return hostile_(model).eval()


def sentences(batch: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Token ids without the special tokens 0 to 2: (batch, length)."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_close(ours: torch.Tensor, reference: torch.Tensor, spread: torch.Tensor, tolerance: float = TOLERANCE):
    """Every element within `tolerance` standard deviations of the logits `spread`."""
    assert ours.shape == reference.shape
    error = (ours - reference).abs().max() / spread.std()
    assert error <= tolerance, f"off by {error:.2e} of the logits' standard deviation"


def preset_config(name: str) -> VariantConfig:
    """A tiny model whose windows, where it has any, are shorter than the inputs."""
    overrides = {"sliding_window": 5} if "sliding_window" in PRESETS[name].axes else {}
    return VariantConfig.from_preset(
        name,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        num_attention_heads=4,
        num_hidden_layers=6 if name == "gemma3" else 4,
        max_position_embeddings=64,
        **overrides,
    )


CHECKS: dict[str, Callable[[VariantConfig], None]] = {}


def check(function: Callable[[VariantConfig], None]) -> Callable[[VariantConfig], None]:
    CHECKS[function.__name__] = function
    return function


@check
def every_parameter_learns(config):
    model = build(config).train()
    input_ids = sentences()
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    assert loss.isfinite()
    # Frozen are stored tables of sinusoids alone.
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in model.named_parameters()} - set(learned)
    assert [name for name in frozen if not name.startswith(("model.embed_positions.", "model.rotary_emb."))] == []
    assert [name for name, parameter in learned.items() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in learned.values())
    # A key's bias, or all of the scores under a window of one, can cancel in the softmax.
    still = [name for name, parameter in learned.items() if not parameter.grad.any()]
    assert [name for name in still if not any(part in name for part in ("q_", "k_", "position_bias"))] == []


@check
def loss_is_the_documented_one(config):
    model = build(config)
    input_ids = sentences()
    labels = input_ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        output = model(input_ids, labels=labels)
    logits = output.logits[:, :-1].double()
    counted = labels[:, 1:] != -100
    log_z = logits.logsumexp(-1)
    log_p = logits - log_z[..., None]
    hit = log_p.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    smoothing = config.label_smoothing
    token_loss = -(1 - smoothing) * hit - smoothing * log_p.mean(-1) + config.z_loss_coefficient * log_z**2
    torch.testing.assert_close(output.loss.double(), token_loss[counted].mean(), rtol=1e-5, atol=1e-5)


def generate_and_score(config: VariantConfig, cache: str, implementation: str = "eager") -> None:
    """Generate greedily from a left-padded batch, then score the result in one pass without a cache."""
    model = build(config, implementation)
    prompt = sentences(length=9)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    prompt[mask == 0] = 0
    generation = GenerationConfig(
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    # Every sequence goes on to the end.
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        output = model.generate(prompt, attention_mask=mask, generation_config=generation)
        sequences = output.sequences
        mask = torch.cat([mask, torch.ones(2, sequences.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(sequences, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    scored = logits[:, prompt.shape[1] - 1 : -1]
    stepwise = torch.stack(output.logits, dim=1)
    assert_close(stepwise, scored, scored)
    best = scored.topk(2, dim=-1)
    # Where the best two are closer than rounding, either may be picked.
    clear = (best.values[..., 0] - best.values[..., 1]) > 2 * TOLERANCE * scored.std()
    generated = sequences[:, prompt.shape[1] :]
    assert torch.equal(generated[clear], best.indices[..., 0][clear])


@check
def dynamic_cache_changes_nothing(config):
    generate_and_score(config, "dynamic")


@check
def static_cache_changes_nothing(config):
    generate_and_score(config, "static")


@check
def chunked_prefill_changes_nothing(config):
    model = build(config)
    input_ids = sentences()
    with torch.no_grad():
        whole = model(input_ids, use_cache=False).logits
        first = model(input_ids[:, :6], use_cache=True)
        second = model(input_ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    assert_close(torch.cat([first.logits, second.logits], dim=1), whole, whole)


@check
def sdpa_equals_eager(config):
    model = build(config)
    input_ids = sentences()
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    if unsupported := config.unsupported_attention_features("sdpa"):
        with pytest.raises(ValueError, match=f"sdpa cannot compute .*{unsupported[0]}"):
            model.set_attn_implementation("sdpa")
        return
    for attention_mask in (None, mask):
        real = slice(None) if attention_mask is None else mask.bool()
        with torch.no_grad():
            model.set_attn_implementation("eager")
            eager = model(input_ids, attention_mask=attention_mask).logits[real]
            model.set_attn_implementation("sdpa")
            sdpa = model(input_ids, attention_mask=attention_mask).logits[real]
        assert_close(sdpa, eager, eager)


@check
def flex_equals_eager(config):
    if config.attention_features["attention_sinks"]:
        # transformers' flex attention has no sinks on a CPU, and says so.
        return
    model = build(config)
    input_ids = sentences()
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    with torch.no_grad():
        eager = model(input_ids, attention_mask=mask).logits[mask.bool()]
        model.set_attn_implementation("flex_attention")
        # Compiling takes seconds for each config; the function that is compiled is the same.
        with torch.compiler.set_stance("force_eager"):
            flex = model(input_ids, attention_mask=mask).logits[mask.bool()]
    assert_close(flex, eager, eager)


@check
def padding_changes_nothing(config):
    model = build(config)
    for implementation in ("eager",) if config.unsupported_attention_features("sdpa") else ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        short = sentences(batch=1, length=9)
        with torch.no_grad():
            alone = model(short).logits[0]
            for side in ("left", "right"):
                batch, mask = sentences(), torch.ones(2, LENGTH, dtype=torch.long)
                real = slice(LENGTH - 9, None) if side == "left" else slice(None, 9)
                batch[1], mask[1] = 0, 0
                batch[1, real], mask[1, real] = short[0], 1
                position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
                padded = model(batch, attention_mask=mask, position_ids=position_ids).logits[1, real]
                assert_close(padded, alone, alone)


@check
def the_future_changes_nothing(config):
    model = build(config)
    input_ids = sentences()
    changed = input_ids.clone()
    changed[:, 8:] = sentences(length=LENGTH - 8, seed=1)
    with torch.no_grad():
        before, after = model(input_ids).logits, model(changed).logits
    assert_close(after[:, :8], before[:, :8], before)
    assert (after[:, 8:] - before[:, 8:]).abs().max() > 1e-2 * before.std()


@check
def packed_documents_do_not_see_each_other(config):
    model = build(config)
    first, second = sentences(batch=1, length=6), sentences(batch=1, length=8, seed=1)
    position_ids = torch.cat([torch.arange(6), torch.arange(8)])[None]
    with torch.no_grad():
        alone = torch.cat([model(first).logits, model(second).logits], dim=1)
        packed = model(torch.cat([first, second], dim=1), position_ids=position_ids).logits
    assert_close(packed, alone, alone)


@check
def embeddings_may_be_given(config):
    model = build(config)
    input_ids = sentences()
    with torch.no_grad():
        reference = model(input_ids).logits
        ours = model(inputs_embeds=model.get_input_embeddings()(input_ids)).logits
    assert torch.equal(ours, reference)


@check
def token_types_stay_with_their_tokens(config):
    model = build(config)
    input_ids = sentences()
    types = torch.arange(LENGTH).expand_as(input_ids) % 2
    with torch.no_grad():
        untyped = model(input_ids, use_cache=False).logits
        whole = model(input_ids, token_type_ids=types, use_cache=False).logits
        first = model(input_ids[:, :6], token_type_ids=types[:, :6], use_cache=True)
        second = model(input_ids[:, 6:], token_type_ids=types[:, 6:], past_key_values=first.past_key_values)
    assert_close(torch.cat([first.logits, second.logits], dim=1), whole, whole)
    has_types = config.type_vocab_size > 0 or config.token_type_table == "tokens"
    assert torch.equal(untyped, whole) != has_types


@check
def logits_to_keep_selects(config):
    model = build(config)
    input_ids = sentences()
    with torch.no_grad():
        logits = model(input_ids).logits
        last = model(input_ids, logits_to_keep=3).logits
        some = model(input_ids, logits_to_keep=torch.tensor([1, 7])).logits
    assert_close(last, logits[:, -3:], logits)
    assert_close(some, logits[:, [1, 7]], logits)


@check
def resizing_keeps_old_tokens(config):
    model = build(config)
    input_ids = sentences()
    with torch.no_grad():
        before = model(input_ids).logits
        model.resize_token_embeddings(VOCAB + 7)
        after = model(input_ids).logits
    assert after.shape[-1] == model.config.vocab_size == VOCAB + 7
    assert_close(after[..., :VOCAB], before, before)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == config.tie_word_embeddings


@check
def gradient_checkpointing_changes_nothing(config):
    model = build(config).train()
    input_ids = sentences()
    model(input_ids, labels=input_ids).loss.backward()
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = {name: parameter.grad.clone() for name, parameter in learned.items()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(input_ids, labels=input_ids).loss.backward()
    # A tied weight adds up its gradients in another order, and those of a key's bias cancel up to rounding.
    scale = max(gradient.abs().max().item() for gradient in plain.values())
    for name, parameter in learned.items():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-6 * scale, msg=name)


@check
def bfloat16_stays_bfloat16(config):
    model = build(config).to(torch.bfloat16)
    input_ids = sentences()
    with torch.no_grad():
        output = model(input_ids, use_cache=True, output_hidden_states=True)
        after = model(input_ids[:, :1], past_key_values=output.past_key_values)
    for states in (*output.hidden_states, output.logits, after.logits):
        assert states.dtype == torch.bfloat16
        assert states.isfinite().all()
    cached = [layer.keys.dtype for layer in output.past_key_values.layers if layer.get_seq_length()]
    assert set(cached) == {torch.bfloat16}


@check
def states_and_weights_are_recorded(config):
    model = build(config)
    input_ids = sentences()
    with torch.no_grad():
        output = model(input_ids, output_hidden_states=True, output_attentions=True)
    attending = [layer for layer in config.per_layer_config if "self_attn" not in getattr(layer, "skip", ())]
    assert len(output.hidden_states) == config.num_hidden_layers + 1
    assert [weights.shape for weights in output.attentions] == [
        (2, layer.num_attention_heads, LENGTH, LENGTH) for layer in attending
    ]
    for layer, weights in zip(attending, output.attentions, strict=True):
        if not layer.attention_sinks:
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


CONFIG_CHECKS = pytest.mark.parametrize("name", CHECKS)


@CONFIG_CHECKS
@pytest.mark.parametrize("preset", PRESETS)
def test_preset(preset, name):
    CHECKS[name](preset_config(preset))


@CONFIG_CHECKS
@given(fields=variant_fields())
def test_random(name, fields):
    CHECKS[name](VariantConfig(**fields))


# Not drawn: what only encoders, encoder-decoders, classifiers, training or generation read.
NOT_DRAWN = {
    "add_cross_attention", "bos_token_id", "choice_pooling", "choice_transform", "choice_transform_act",
    "classifier_bias", "classifier_pooling", "classifier_transform",
    "classifier_transform_act", "classifier_transform_bias", "classifier_transform_norm",
    "classifier_transform_on_tokens", "cross_attention_hidden_size", "deepnorm_alpha", "deepnorm_beta",
    "eos_token_id", "ffn_chunk_size", "generation_counts_padding", "initializer_cutoff_factor", "initializer_norm_ones",
    "initializer_positions", "initializer_range", "initializer_scheme", "initializer_sinks", "is_causal",
    "argument_order", "lm_head_unread_bias",
    "longrope_recomputes_cache", "loss_in_float32", "native_leftovers", "pooler", "pooler_scope", "shift_labels",
    "token_classifier_loss_in_float32", "use_cache",
    # Of float16.
    "clamp_in_float16", "ffn_output_in_float32",
}  # fmt: skip


def test_every_axis_is_drawn():
    drawn: set[str] = set()

    @settings(max_examples=150)
    @given(fields=variant_fields())
    def draw(fields):
        drawn.update(fields)

    draw()
    forgotten = {name for name in FIELDS.keys() - drawn - NOT_DRAWN if "dropout" not in name and name != "layerdrop"}
    assert forgotten == set()


def reload(config: VariantConfig, folder) -> None:
    """Saved and loaded, a model gives the same bits: its config, its parameters, and the buffers it does not save."""
    model = build(config)
    model.save_pretrained(folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    assert type(loaded) is VariantForCausalLM
    assert loaded.config.to_json_string() == model.config.to_json_string()
    assert {name: buffer.tolist() for name, buffer in loaded.named_buffers()} == {
        name: buffer.tolist() for name, buffer in model.named_buffers()
    }
    with torch.no_grad():
        assert torch.equal(loaded.eval()(sentences()).logits, model(sentences()).logits)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_reloads(preset, tmp_path):
    reload(preset_config(preset), tmp_path)


@given(fields=variant_fields())
def test_random_reloads(fields, tmp_path_factory):
    reload(VariantConfig(**fields), tmp_path_factory.mktemp("model"))

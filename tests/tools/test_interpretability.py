"""TransformerLens on variants: the same logits, and every activation, edit and gradient is what the model itself has."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import hf_variants
from tests.strategies import hostile_, variant_fields

from . import kinds
from .features import BASE, FEATURES, RARER, variant


LENS = pytest.mark.tool("TransformerLens: hooks, caches, lenses", package="transformer-lens")
PATCHING = pytest.mark.tool("TransformerLens: attribution patching", package="transformer-lens")
pytestmark = pytest.mark.whole

# What it is called there -> in a layer of ours, in which its input or output is looked at.
LAYER = {
    "ln1": "self_attn_pre_norm", "ln1_post": "self_attn_branch_norm", "ln1_residual": "self_attn_post_norm",
    "ln2": "mlp_pre_norm", "ln2_post": "mlp_branch_norm", "ln2_residual": "mlp_post_norm",
    "ln_cross": "cross_attn_pre_norm", "ln_cross_post": "cross_attn_branch_norm",
    "ln_cross_residual": "cross_attn_post_norm",
    "attn": "self_attn", "self_attn": "self_attn", "cross_attn": "cross_attn", "mlp": "mlp",
    "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "gate": "g_proj",
    "q_norm": "q_norm", "k_norm": "k_norm", "sub_norm": "sub_norm", "in": "up_proj", "out": "down_proj",
}  # fmt: skip
OF_MLP = {"gate": "gate_proj"}
STACK = {
    "embed": "embed_tokens", "embed_ln": "embedding_norm", "embed_token_ln": "token_norm", "ln_final": "norm",
    "project_out": "output_projection",
}  # fmt: skip
# Looked at below, by what they mean.
POINTS = {
    "hook_attn_scores", "hook_pattern", "hook_rot_q", "hook_rot_k", "hook_attn_out", "hook_mlp_out", "hook_scale",
    "hook_cross_attn_out", "hook_resid_mid", "hook_resid_mid2", "hook_normalized",
}  # fmt: skip
SHAPES = {name: configs[0] for name, configs in {**FEATURES, **RARER}.items()}


def inputs_of(model):
    stack = model.config.decoder if model.config.is_encoder_decoder else model.config
    ids = kinds.batch("llama")["input_ids"] % stack.vocab_size
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {})}


def both(model):
    """A model with its hooks in TransformerLens, and the model as it was."""
    from hf_variants.interpretability import bridge

    model.set_attn_implementation("eager")
    return bridge(copy.deepcopy(model)), model


def run(lens, model, **options):
    inputs = inputs_of(model)
    return lens.run_with_cache(inputs.pop("input_ids"), **inputs, **options)


def module_of(model, name):
    """The module that a hook's name stands for, without the hook at its end; `None` for what is no module."""
    *path, hook = name.split(".")
    base, prefix = model.base_model, ""
    if model.config.is_encoder_decoder:
        prefix = path[0].partition("_")[0]
        base = base.decoder if prefix == "decoder" else base.encoder
        path[0] = path[0].removeprefix(f"{prefix}_") if prefix in ("encoder", "decoder") else path[0]
    if hook not in ("hook_in", "hook_out"):
        return None
    if path[0] == "unembed":
        return model.lm_head
    if path[0] == "prediction_head":
        return model.lm_head_transform
    if path[0] != "blocks":
        return getattr(base, STACK[path[0]]) if path[0] in STACK else None
    module = base.layers[int(path[1])]
    for part in path[2:]:
        module = getattr(module, OF_MLP.get(part, LAYER[part]) if path[2] == "mlp" else LAYER[part])
    return module


def seen_by_torch(model, names):
    """What forward hooks of torch see of the modules that these names stand for."""
    seen, handles = {}, []

    def look(name, module):
        def hook(_, args, kwargs, output):
            first = args[0] if args else kwargs["hidden_states"]
            value = first if name.endswith("hook_in") else output
            seen[name] = value[0] if isinstance(value, tuple) else value

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    for name in names:
        if (module := module_of(model, name)) is not None:
            look(name, module)
    output = model(**inputs_of(model))
    for handle in handles:
        handle.remove()
    return seen, output


def canonical(lens, cache):
    """The names in a cache, without the further ones of the same hook."""
    return [name for name in cache if lens.hook_dict[name].name == name]


@LENS
@pytest.mark.parametrize("kind", kinds.SHARDED_KINDS)
@torch.no_grad()
def test_every_activation_is_what_torch_sees(kind):
    lens, model = both(kinds.model(kind))
    logits, cache = run(lens, model)
    names = canonical(lens, cache)
    seen, output = seen_by_torch(model, names)
    assert torch.equal(logits, output.logits)
    assert len(seen) > 25
    for name, value in seen.items():
        assert torch.equal(cache[name].reshape(value.shape), value), name
    others = {name.rpartition(".")[2] for name in set(names) - set(seen) if "pos_embed" not in name}
    assert others - {"hook_in", "hook_out"} <= POINTS
    tables = [name for name in set(names) - set(seen) if name.endswith(("hook_in", "hook_out"))]
    assert all("pos_embed" in name or "type_embed" in name for name in tables)


@LENS
@pytest.mark.parametrize("kind", kinds.SHARDED_KINDS)
@torch.no_grad()
def test_scores_patterns_and_streams_are_what_they_are_called(kind):
    lens, model = both(kinds.model(kind))
    _, cache = run(lens, model)
    output = model(**inputs_of(model), output_attentions=True)
    stacks = {"": (model.base_model, output.get("attentions"))}
    if model.config.is_encoder_decoder:
        stacks = {
            "encoder_": (model.base_model.encoder, output.encoder_attentions),
            "decoder_": (model.base_model.decoder, output.decoder_attentions),
        }
    for prefix, (stack, attentions) in stacks.items():
        name = "self_attn" if prefix == "decoder_" else "attn"
        for layer, weights in enumerate(attentions):
            block = f"{prefix}blocks.{layer}"
            assert torch.equal(cache[f"{block}.{name}.hook_pattern"], weights)
            assert torch.equal(cache[f"{block}.{name}.hook_attn_scores"].softmax(-1), weights)
            streams = {key: cache[f"{block}.{key}"] for key in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")}
            total = sum(streams.values())
            if f"{block}.hook_cross_attn_out" in cache:
                total = total + cache[f"{block}.hook_cross_attn_out"]
            if f"{block}.ln2_residual.hook_in" not in cache:
                torch.testing.assert_close(total, cache[f"{block}.hook_resid_post"], rtol=1e-5, atol=1e-5)
            elif prefix != "decoder_":
                normed = stack.layers[layer].self_attn_post_norm(streams["hook_resid_pre"] + streams["hook_attn_out"])
                assert torch.equal(cache[f"{block}.hook_resid_mid"], normed)
    if "pos_embed.hook_out" in cache and "embed_ln.hook_in" not in cache:
        whole = cache["embed.hook_out"] + cache["pos_embed.hook_out"]
        whole = whole + cache["token_type_embed.hook_out"] if "token_type_embed.hook_out" in cache else whole
        first = "encoder_blocks" if model.config.is_encoder_decoder else "blocks"
        torch.testing.assert_close(whole, cache[f"{first}.0.hook_resid_pre"], rtol=1e-5, atol=1e-5)


@LENS
@pytest.mark.parametrize("kind", kinds.SHARDED_KINDS)
@torch.no_grad()
def test_a_head_without_effect_is_one_whose_columns_are_zero(kind):
    lens, model = both(kinds.model(kind))
    decoder = model.base_model.decoder if model.config.is_encoder_decoder else model.base_model
    attention, head = decoder.layers[1].self_attn, 2
    name = "decoder_blocks.1.self_attn.hook_z" if model.config.is_encoder_decoder else "blocks.1.attn.hook_z"

    def ablate(z, hook):
        z[:, :, head] = 0.0
        return z

    inputs = inputs_of(model)
    whole = model(**inputs).logits
    ablated = lens.run_with_hooks(inputs.pop("input_ids"), **inputs, fwd_hooks=[(name, ablate)])
    size = attention.head_dim
    attention.o_proj.weight[:, head * size : (head + 1) * size] = 0.0
    by_hand = model(**inputs_of(model)).logits
    torch.testing.assert_close(ablated, by_hand, rtol=1e-5, atol=1e-5 * whole.std().item())
    assert (by_hand - whole).abs().max() > 1e-3 * whole.std()


@LENS
@pytest.mark.parametrize("kind", kinds.SHARDED_KINDS)
@torch.no_grad()
def test_an_edit_of_scores_or_patterns_has_its_effect(kind):
    lens, model = both(kinds.model(kind))
    block = "encoder_blocks.0.attn" if model.config.is_encoder_decoder else "blocks.0.attn"
    inputs = inputs_of(model)
    ids = inputs.pop("input_ids")

    def to_itself(pattern, hook):
        return torch.eye(pattern.shape[-1]).expand_as(pattern)

    def away_from_others(scores, hook):
        return scores.masked_fill(~torch.eye(scores.shape[-1], dtype=torch.bool), -torch.inf)

    edits = {f"{block}.hook_pattern": to_itself, f"{block}.hook_attn_scores": away_from_others}
    runs = [lens.run_with_hooks(ids, **inputs, fwd_hooks=[edit]) for edit in edits.items()]
    assert torch.equal(*runs)
    # A head then gives the value of the token itself.
    _, cache = run(lens, model)
    values = cache[f"{block}.hook_v"]
    with lens.hooks(fwd_hooks=[(f"{block}.hook_pattern", to_itself)]):
        _, edited = run(lens, model)
    z = edited[f"{block}.hook_z"]
    torch.testing.assert_close(z, values.repeat_interleave(z.shape[2] // values.shape[2], dim=2))


@LENS
@pytest.mark.parametrize("kind", kinds.SHARDED_KINDS)
@torch.no_grad()
def test_the_last_layer_of_the_lens_are_the_logits(kind):
    from transformer_lens.tools.analysis.logit_lens import logit_lens as theirs

    from hf_variants.interpretability import logit_lens

    lens, model = both(kinds.model(kind))
    logits, cache = run(lens, model)
    blocks = "decoder_blocks" if model.config.is_encoder_decoder else "blocks"
    assert torch.equal(logit_lens(lens, cache[f"{blocks}.1.hook_resid_post"]), logits)
    assert not torch.allclose(logit_lens(lens, cache[f"{blocks}.0.hook_resid_post"]), logits)
    if model.config.is_encoder_decoder:
        return
    stack = theirs(lens, inputs_of(model)["input_ids"], positions=None).values
    torch.testing.assert_close(stack[-1], logits, rtol=1e-5, atol=1e-5 * logits.std().item())
    assert not torch.allclose(stack[-2], logits)


@PATCHING
@pytest.mark.parametrize("kind", [kind for kind in kinds.SHARDED_KINDS if kind != "seq2seq"])
def test_attribution_is_what_torch_differentiates(kind):
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    lens, model = both(kinds.model(kind))
    clean, corrupt = inputs_of(model)["input_ids"].split(1)

    def metric(logits):
        return logits[0, -1, 5] - logits[0, -1, 7]

    scores = attribution_patch(lens, clean, corrupt, metric, EdgeAttributionConfig(granularity="node")).node_scores
    attention, seen = model.base_model.layers[1].self_attn, []
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(clean)
    outcome = metric(model(corrupt).logits)
    (gradient,) = torch.autograd.grad(outcome, seen[1])
    effects = ((seen[0] - seen[1]) * gradient).unflatten(-1, (-1, attention.head_dim)).sum(-1)[0].detach()
    found = {(n.position, n.head): x for n, x in scores.items() if n.kind == "attn_head_out" and n.layer == 1}
    made = torch.tensor([[found[position, head] for head in range(4)] for position in range(len(effects))])
    assert len(found) == effects.numel()
    assert effects.abs().max() > 0
    torch.testing.assert_close(made, effects, rtol=1e-4, atol=1e-5 * effects.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_computes_as_before(shape):
    check_shape(variant(SHAPES[shape]))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(fields=variant_fields())
def test_any_shape_computes_as_before(fields):
    torch.manual_seed(0)
    check_shape(hostile_(hf_variants.VariantForCausalLM(hf_variants.VariantConfig(**fields))).eval())


def check_shape(model):
    """The same logits and gradients, activations as torch sees them, and a lens that ends in the logits."""
    from hf_variants.interpretability import logit_lens

    lens, model = both(model)
    expected = model(**inputs_of(model)).logits
    expected.square().mean().backward()
    inputs = inputs_of(model)
    logits = lens(inputs.pop("input_ids"), **inputs)
    assert torch.equal(logits, expected)
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = [p.grad for p in lens.original_model.parameters() if p.grad is not None]
    assert len(theirs) == len(gradients)
    assert all(torch.equal(a, b) for a, b in zip(theirs, gradients.values()))
    with torch.no_grad():
        _, cache = run(lens, model)
        seen, _ = seen_by_torch(model, canonical(lens, cache))
        for name, value in seen.items():
            assert torch.equal(cache[name].reshape(value.shape), value), name
        blocks = "decoder_blocks" if model.config.is_encoder_decoder else "blocks"
        last = len(getattr(lens, blocks)) - 1
        assert torch.equal(logit_lens(lens, cache[f"{blocks}.{last}.hook_resid_post"]), expected)


@torch.no_grad()
def test_half_precision_and_sdpa_models_are_taken_as_they_are():
    lens, model = both(kinds.model("gemma2").bfloat16())
    assert torch.equal(run(lens, model)[0], model(**inputs_of(model)).logits)


@torch.no_grad()
def test_chunks_of_the_feed_forward_network_are_seen_whole():
    model = variant({**BASE, "ffn_chunk_size": 4})
    lens, model = both(model)
    _, cache = run(lens, model)
    assert cache["blocks.0.hook_mlp_out"].shape[1] == inputs_of(model)["input_ids"].shape[1]


@torch.no_grad()
def test_a_model_without_a_head_shows_its_stack():
    lens, model = both(kinds.model("encoder", hf_variants.VariantModel))
    states, cache = run(lens, model)
    assert torch.equal(states, model(**inputs_of(model)).last_hidden_state)
    assert "blocks.1.attn.hook_z" in cache


@torch.no_grad()
def test_it_generates_what_the_model_does():
    lens, model = both(kinds.model("llama"))
    ids = inputs_of(model)["input_ids"][:1]
    made = lens.generate(ids, max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False)
    scores = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert made.tolist() == scores.tolist()


def test_their_lens_refuses_what_it_would_pass_over():
    from transformer_lens.tools.analysis.logit_lens import logit_lens as theirs

    lens, model = both(variant(SHAPES["transform of a head"]))
    with pytest.raises(ValueError, match="prediction_head"):
        theirs(lens, inputs_of(model)["input_ids"])


def test_weights_are_not_rewritten():
    lens, _ = both(kinds.model("llama"))
    with pytest.raises(RuntimeError, match="compatibility mode"):
        lens.enable_compatibility_mode()


def test_models_of_others_are_refused():
    from hf_variants.interpretability import bridge

    with pytest.raises(ValueError, match="from_native"):
        bridge(nn.Linear(2, 2))

"""Every mistake that conversions are known to make, made on purpose: `verify` must see it, in the outputs too."""

import copy
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BartConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)

import hf_variants
from hf_variants.conversion import convert, verify
from tests.parity import hostile_


SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
GPT2 = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = {
    "vocab_size": 61, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 96, "word_embed_proj_dim": 32, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip
NEOX = {name: SIZES[name] for name in SIZES if name not in ("num_key_value_heads", "head_dim")}
NATIVES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied llama": ("llama", {"tie_word_embeddings": True}),
    "YaRN": ("llama", {"rope_parameters": YARN}),
    "longrope past 4096": ("llama", {"rope_parameters": LONGROPE, "max_position_embeddings": 16384}),
    "dynamic past 4096": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 4096}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}),
    "short window": ("mistral", {"sliding_window": 9}),
    "long window": ("mistral", {"sliding_window": 4096, "max_position_embeddings": 32768}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"sliding_window": 9, "query_pre_attn_scalar": 24, "final_logit_softcapping": 3.0}),
    "granite": ("granite", {"residual_multiplier": 0.4, "logits_scaling": 3.0, "embedding_multiplier": 5.0}),
    "cohere": ("cohere", {"logit_scale": 0.3}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "bloom": ("bloom", {"vocab_size": 61, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "no cache": ("openai-gpt", {}),
}
OWN_SIZES = {"gpt2": GPT2, "openai-gpt": {n: v for n, v in GPT2.items() if n[0] == "n" or n == "vocab_size"}, "opt": OPT,
             "gpt_neox": NEOX, "bloom": {}}  # fmt: skip


def native_model(name):
    model_type, fields = NATIVES[name]
    config = CONFIG_MAPPING[model_type](**{**OWN_SIZES.get(model_type, SIZES), **fields})
    return hostile_(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)).eval()


@pytest.fixture(scope="module")
def pairs():
    """Native model and converted variant by name, each made once."""
    made = {}

    def pair(name):
        if name not in made:
            native = native_model(name)
            made[name] = native, hf_variants.from_native(native)
        return made[name]

    return pair


def with_fields(model, **changes):
    """The same weights under another config; tensors that it has no place for are lost."""
    config = hf_variants.VariantConfig.from_dict({**model.config.to_dict(), **changes})
    other = hf_variants.VariantForCausalLM(config).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    return other


def fields(**changes):
    return lambda model: with_fields(model, **changes)


def edit(function):
    """A mistake in the weights of a copy."""

    def mutate(model):
        model = copy.deepcopy(model)
        with torch.no_grad():
            function(model)
        return model

    return mutate


def to_halves(tensor, heads):
    """Rows of interleaved pairs -> halves, as Meta's checkpoints need and others do not."""
    rows = tensor.unflatten(0, (heads, -1, 2))
    return rows.transpose(1, 2).reshape(tensor.shape)


def permute_rope(times, key_heads=2):
    def function(model):
        for layer in model.model.layers:
            for _ in range(times):
                for leaf in ("weight", "bias"):
                    for projection, heads in ((layer.self_attn.q_proj, 4), (layer.self_attn.k_proj, key_heads)):
                        if getattr(projection, leaf) is not None:
                            getattr(projection, leaf).copy_(to_halves(getattr(projection, leaf), heads))

    return edit(function)


def permute_key_heads(model):
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.copy_(to_halves(layer.self_attn.k_proj.weight, 4))


def unmix_neox(model):
    """Heads of [q, k, v] read as if all q came first."""
    for layer in model.model.layers:
        attention = layer.self_attn
        for leaf in ("weight", "bias"):
            q, k, v = (
                getattr(projection, leaf) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            fused = torch.stack([part.unflatten(0, (4, -1)) for part in (q, k, v)], dim=1).flatten(0, 2)
            for part, wrong in zip((q, k, v), fused.chunk(3), strict=True):
                part.copy_(wrong)


def transpose(path):
    def function(model):
        for layer in model.model.layers:
            weight = layer.get_submodule(path).weight
            weight.copy_(weight.T.clone())

    return edit(function)


def add_one(path):
    def function(model):
        model.get_submodule(path).weight.add_(1.0)

    return edit(function)


def add_one_everywhere(model):
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(1.0)


def neutral_norm(model):
    torch.nn.init.ones_(model.model.layers[1].mlp_pre_norm.weight)


def swap_gate_and_up(model):
    for layer in model.model.layers:
        gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
        saved = gate.clone()
        gate.copy_(up)
        up.copy_(saved)


def swap_layers(model):
    first, second = (copy.deepcopy(model.model.layers[i].state_dict()) for i in (0, 1))
    model.model.layers[0].load_state_dict(second)
    model.model.layers[1].load_state_dict(first)


def swap_value_heads(model):
    for layer in model.model.layers:
        weight = layer.self_attn.v_proj.weight
        weight.copy_(weight.unflatten(0, (2, -1)).flip(0).flatten(0, 1))


def shift_vocabulary(model):
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.roll(1, 0))
    model.tie_weights()


def tie(model):
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)


def untie(model):
    other = with_fields(model, tie_word_embeddings=False)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    return other


def drop_bias(model):
    model.model.layers[1].self_attn.k_proj.bias.zero_()
    model.model.layers[1].mlp.down_proj.bias.zero_()


def cut_offset_at_the_wrong_end(model):
    return with_fields(model, max_position_embeddings=98, position_offset=0, position_ids_source="sequence")


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}

# mistake: (native model, what is done to the variant)
MUTATIONS = {
    "RoPE permutation of another layout applied": ("llama", permute_rope(1)),
    "RoPE permutation applied twice": ("llama", permute_rope(2)),
    "RoPE permutation with the wrong number of key heads": ("llama", edit(permute_key_heads)),
    "interleaved RoPE read as halves": ("cohere", fields(rope_interleaved=False)),
    "interleaved RoPE permuted as well": ("cohere", permute_rope(1)),
    "NeoX heads not taken apart": ("gpt_neox", edit(unmix_neox)),
    "square matrix transposed": ("gpt2", transpose("self_attn.o_proj")),
    "square query matrix transposed": ("llama", transpose("self_attn.q_proj")),
    "offset of the norms dropped": ("gemma2", fields(norm_unit_offset=False)),
    "offset of the norms doubled": ("gemma2", edit(add_one_everywhere)),
    "offset of the final norm alone": ("gemma2", add_one("model.norm")),
    "offset of the norms invented": ("llama", fields(norm_unit_offset=True)),
    "one norm forgotten": ("llama", edit(neutral_norm)),
    "untied head tied": ("llama", edit(tie)),
    "untied head declared tied": ("llama", fields(tie_word_embeddings=True)),
    "tied head untied with other values": ("tied llama", untie),
    "gate and up swapped": ("llama", edit(swap_gate_and_up)),
    "wrong activation": ("llama", fields(hidden_act="gelu")),
    "nearly the right activation": ("gpt2", fields(hidden_act="gelu")),
    "wrong RoPE base": ("llama", fields(rope_parameters={"rope_type": "default", "rope_theta": 10001.0})),
    "partial RoPE made whole": ("gpt_neox", fields(rope_parameters=PLAIN)),
    "YaRN lost": ("YaRN", fields(rope_parameters=PLAIN)),
    "YaRN's original context lost": (
        "YaRN",
        fields(rope_parameters={**YARN, "original_max_position_embeddings": 96}),
    ),
    "longrope lost, far away": (
        "longrope past 4096",
        fields(rope_parameters={**LONGROPE, "long_factor": LONGROPE["short_factor"]}),
    ),
    "dynamic scaling lost, far away": ("dynamic past 4096", fields(rope_parameters=PLAIN)),
    "llama3 scaling lost": ("llama3", fields(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})),
    "window lost": ("short window", fields(layer_types="F", sliding_window=None)),
    "window off by one": ("short window", fields(sliding_window=8)),
    "long window lost": ("long window", fields(layer_types="F")),
    "windows in the wrong layers": ("gemma2", fields(layer_types="FS")),
    "wrong position offset": ("opt", cut_offset_at_the_wrong_end),
    "wrong attention scale": ("llama", fields(attention_scaling=32**-0.5)),
    "query scalar lost": ("gemma2", fields(attention_scaling=8**-0.5)),
    "biases dropped": ("llama", edit(drop_bias)),
    "biases of a kind dropped": ("llama", fields(attention_output_bias=False)),
    "layers swapped": ("llama", edit(swap_layers)),
    "value heads swapped": ("llama", edit(swap_value_heads)),
    "vocabulary shifted": ("tied llama", edit(shift_vocabulary)),
    "final soft cap lost": ("gemma2", fields(final_logit_softcapping=None)),
    "attention soft cap lost": ("gemma2", fields(attn_logit_softcapping=None)),
    "embedding scale lost": ("gemma2", fields(embedding_multiplier=1.0)),
    "QK-norm lost": ("qwen3", fields(qk_norm="none")),
    "QK-norm after the rotation": ("qwen3", fields(qk_norm_after_rope=True)),
    "residual multiplier lost": ("granite", fields(residual_multiplier=1.0)),
    "logit scale inverted": ("granite", fields(logit_scale=3.0)),
    "norm epsilon": ("llama", fields(norm_eps=1e-5)),
    "parallel block made sequential": ("gpt_neox", fields(parallel_block="none")),
    "ALiBi lost": ("bloom", fields(position_embedding_type="none", attention_score_form="multiplied")),
    "embedding norm lost": ("bloom", fields(embedding_norm=False)),
}


@pytest.mark.parametrize("name", NATIVES)
def test_an_unharmed_model_passes(name, pairs):
    native, ours = pairs(name)
    report = verify(native, ours, new_tokens=4, progress=False)
    assert report.ok, report.to_markdown()
    assert verify(ours, native, new_tokens=0, progress=False).ok


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_is_seen_in_the_outputs(mutation, pairs):
    name, mutate = MUTATIONS[mutation]
    native, ours = pairs(name)
    report = verify(native, mutate(ours), new_tokens=4, progress=False)
    failed = [check.name for check in report.checks if not check.ok]
    assert not report.ok
    assert any(check.startswith("outputs") for check in failed), failed
    assert {"config", "weights"} & set(failed), failed
    assert verify(ours, ours, new_tokens=0, progress=False).ok


def test_a_longer_window_is_seen_in_the_config(pairs):
    native, ours = pairs("long window")
    report = verify(native, with_fields(ours, sliding_window=2048), new_tokens=0, progress=False)
    assert [check.name for check in report.checks if not check.ok] == ["config"]


def test_values_that_are_not_numbers_fail(pairs):
    native, ours = pairs("llama")
    broken = copy.deepcopy(ours)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    report = verify(native, broken, new_tokens=0, progress=False)
    assert "values that are not finite" in report.to_markdown()
    assert not verify(broken, broken, new_tokens=0, progress=False).ok


def test_another_dtype_or_vocabulary_is_named(pairs):
    native, ours = pairs("llama")
    assert "dtype" in verify(native, copy.deepcopy(ours).bfloat16()).to_markdown()
    other = hf_variants.from_native(hostile_(type(native)(CONFIG_MAPPING["llama"](**{**SIZES, "vocab_size": 60}))))
    assert "vocabulary" in verify(native, other).to_markdown()


def test_verify_leaves_the_models_as_they_were(pairs):
    native, ours = (copy.deepcopy(model) for model in pairs("long window"))
    ours.train()
    ours.set_attn_implementation("sdpa")
    verify(native, ours, new_tokens=0, progress=False)
    assert ours.training
    assert not native.training
    assert ours.config._attn_implementation == "sdpa"
    assert (ours.config.sliding_window, native.config.sliding_window) == (4096, 4096)


def test_a_folded_export_verifies_and_a_wrong_fold_does_not():
    config = hf_variants.VariantConfig(**SIZES, rope_interleaved=True, attention_scaling=0.3)
    model = hostile_(hf_variants.VariantForCausalLM(config)).eval()
    native = hf_variants.to_native(model, "llama")
    report = verify(model, native, new_tokens=4, progress=False)
    assert report.ok, report.to_markdown()
    assert "folded" in report.to_markdown()
    with torch.no_grad():
        native.model.layers[0].self_attn.q_proj.weight.mul_(1.00001)
    assert not verify(model, native, new_tokens=0, progress=False).ok


def tampered(folder, function):
    """A folder's weights after a change to the dictionary of tensors."""
    tensors = load_file(folder / "model.safetensors")
    function(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.fixture
def folders(tmp_path, pairs):
    native, _ = pairs("llama")
    native.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant")
    return tmp_path / "native", tmp_path / "variant"


def rename(old, new):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"), "missing"),
        (lambda tensors: tensors.__setitem__("model.layers.0.extra.weight", torch.ones(3)), "unexpected"),
        (rename("model.layers.1.mlp_pre_norm.weight", "model.layers.1.mlp_norm.weight"), "missing"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}),
            "mismatched",
        ),
        (
            lambda tensors: tensors.update(
                {"model.layers.0.self_attn.k_proj.weight": tensors["model.layers.1.self_attn.k_proj.weight"]}
            ),
            "k_proj",
        ),
    ],
)
def test_damaged_folders_are_seen(folders, change, seen):
    native, variant = folders
    assert verify(native, variant, new_tokens=4, progress=False).ok
    tampered(variant, change)
    report = verify(native, variant, new_tokens=4, progress=False)
    assert not report.ok
    assert seen in report.to_markdown()


# What a fresh process sees beside the model: each a change to the variant's folder, and the checks that must see it


def edit_json(name, function):
    def change(folder):
        content = json.loads((folder / name).read_text())
        function(content)
        (folder / name).write_text(json.dumps(content))

    return change


def swap_two_tokens(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["quick"], vocabulary["fox"] = vocabulary["fox"], vocabulary["quick"]


def without_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


TOKENIZER, SETTINGS = "tokenizer_config.json", "generation_config.json"
FOLDER_MUTATIONS = {
    "two token ids swapped": (edit_json("tokenizer.json", swap_two_tokens), {"tokenizer"}),
    "tokenizer forgotten": (without_tokenizer, {"tokenizer"}),
    "padding side": (edit_json(TOKENIZER, lambda c: c.update(padding_side="left")), {"tokenizer"}),
    "longest text": (edit_json(TOKENIZER, lambda c: c.update(model_max_length=7)), {"tokenizer"}),
    "special token lost": (edit_json(TOKENIZER, lambda c: c.pop("eos_token")), {"tokenizer"}),
    "text normalised": (edit_json("tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"})), {"tokenizer"}),
    "chat template": (lambda f: (f / "chat_template.jinja").write_text("{{ messages[0] }}"), {"tokenizer"}),
    "beams lost": (
        edit_json(SETTINGS, lambda c: c.pop("num_beams")),
        {"generation config", "tokens with the checkpoint's own settings"},
    ),
    "temperature": (edit_json(SETTINGS, lambda c: c.update(temperature=9.0, do_sample=True)), {"generation config"}),
    "end of text": (edit_json(SETTINGS, lambda c: c.update(eos_token_id=[2, 5])), {"generation config"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A native folder with a tokenizer and settings of its own, converted."""
    folder = tmp_path_factory.mktemp("complete")
    native = copy.deepcopy(native_model("llama"))
    native.generation_config.update(num_beams=3, do_sample=True, temperature=2.0, no_repeat_ngram_size=2)
    native.save_pretrained(folder / "native")
    words = ["<pad>", "<s>", "</s>", "<unk>", "the", "quick", "brown", "fox", "Hello", "."]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder / "native")
    convert(folder / "native", folder / "variant")
    return folder / "native", folder / "variant"


def test_complete_folders_pass(complete):
    report = verify(*complete, new_tokens=4, progress=False)
    assert report.ok, report.to_markdown()
    names = {check.name for check in report.checks}
    assert {"tokenizer", "generation config", "tokens with the checkpoint's own settings", "training loss"} <= names


@pytest.mark.parametrize("mutation", FOLDER_MUTATIONS)
def test_a_mistake_beside_the_model_is_seen(mutation, complete, tmp_path):
    change, seen = FOLDER_MUTATIONS[mutation]
    native, variant = complete
    shutil.copytree(variant, tmp_path / "variant")
    change(tmp_path / "variant")
    for sides in ((native, tmp_path / "variant"), (tmp_path / "variant", native)):
        report = verify(*sides, new_tokens=4, progress=False)
        assert {check.name for check in report.checks if not check.ok} >= seen, report.to_markdown()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_on_request(dtype, complete, pairs):
    report = verify(*complete, dtype=dtype, new_tokens=4, progress=False)
    assert report.ok, report.to_markdown()
    native, ours = pairs("llama")
    assert verify(native, ours, dtype=dtype, new_tokens=4, progress=False).ok
    assert native.dtype is ours.dtype is torch.float32
    assert not verify(native, edit(swap_layers)(ours), dtype=dtype, new_tokens=0, progress=False).ok


def test_the_attention_that_runs_by_default(tmp_path, pairs):
    """The stock class has eager attention alone; sdpa rounds in another way."""
    native, _ = pairs("bloom")
    native.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant")
    assert verify(tmp_path / "native", tmp_path / "variant", new_tokens=0, progress=False).ok
    # A saved copy stays what it is, and an implementation that is asked for wins.
    AutoModelForCausalLM.from_pretrained(tmp_path / "variant").save_pretrained(tmp_path / "saved")
    assert verify(tmp_path / "native", tmp_path / "saved", new_tokens=0, progress=False).ok
    asked = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="sdpa")
    assert asked.config._attn_implementation == "sdpa"
    edit_json("config.json", lambda content: content.update(eager_by_default=False))(tmp_path / "variant")
    report = verify(tmp_path / "native", tmp_path / "variant", new_tokens=0, progress=False)
    assert [check.name for check in report.checks if not check.ok] == [
        "outputs with eager and sdpa attention, as loaded"
    ]


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_dropout_that_the_other_lacks(rate):
    config = CONFIG_MAPPING["gpt2"](**GPT2, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    native = hostile_(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)).eval()
    ours = hf_variants.from_native(native)
    assert verify(native, ours, new_tokens=0, progress=False).ok
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
    report = verify(native, ours, new_tokens=0, progress=False)
    assert [check.name for check in report.checks if not check.ok] == ["training loss"]


def test_rows_of_the_vocabulary_that_no_input_draws(pairs):
    """Two native types, of which neither has the other's layout."""
    fields = {**SIZES, "vocab_size": 5000}
    config = hf_variants.VariantConfig(**fields)
    model = hostile_(hf_variants.VariantForCausalLM(config)).eval()
    llama, mistral = (hf_variants.to_native(model, model_type) for model_type in ("llama", "mistral"))
    assert verify(llama, mistral, new_tokens=0, progress=False).ok
    with torch.no_grad():
        mistral.model.embed_tokens.weight[4999] += 1
    report = verify(llama, mistral, new_tokens=0, progress=False)
    assert [check.name for check in report.checks if not check.ok] == ["weights"]


def test_two_kinds_of_model_differ(pairs):
    decoder, _ = pairs("llama")
    others = [
        MODEL_MAPPING[type(decoder.config)](decoder.config),
        hf_variants.VariantForMaskedLM(hf_variants.VariantConfig(**SIZES, is_causal=False)),
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[BartConfig](
            BartConfig(vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4)
        ),
    ]
    for other in others:
        for sides in ((decoder, other), (other, decoder)):
            report = verify(*sides, new_tokens=0, progress=False)
            assert "kind of model" in [check.name for check in report.checks if not check.ok]


def test_random_weights_are_not_mistaken_for_each_other():
    config = CONFIG_MAPPING["llama"](**SIZES)
    a, b = (hostile_(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config), seed) for seed in (0, 1))
    rng = random.Random(0)
    assert not verify(a, b, new_tokens=rng.choice((0, 4)), progress=False).ok

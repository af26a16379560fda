"""GGUF out: the file is read back as the same model, others read the same in it, and what it cannot say is refused."""

import itertools
import json

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import hf_variants
import hf_variants_cli
from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForMaskedLM,
    VariantForSequenceClassification,
    presets,
)
from hf_variants.conversion import ConversionError, NotRepresentable, VerificationFailed, from_native
from hf_variants.conversion.engines import ENGINES, export_to_engine
from hf_variants.conversion.engines import gguf as room
from hf_variants.conversion.engines.export import in_float32
from hf_variants.conversion.engines.gguf import keys as file_keys
from hf_variants.conversion.engines.gguf import proof
from hf_variants.conversion.engines.gguf.file import format_of
from hf_variants.conversion.engines.gguf.runtime import unread
from hf_variants.conversion.gguf_files.architectures import ARCHITECTURES
from hf_variants.conversion.gguf_files.container import GGUFFile
from hf_variants.conversion.record import read_record
from tests.native_rows import all_rows
from tests.parity import hostile_, random_native
from tests.test_gguf_files import GROUPED, MODELS, SIZES, rope, stock
from tests.tools.features import FEATURES, RARER, with_and_without


# What the runtime does not read, of models as small as these.
REFUSED = {
    "llama yarn, all keys": "rope_parameters", "mistral with a window": "sliding_window", "exaone4": "sliding_window",
    "phi3": "sliding_window", "starcoder2": "sliding_window",
    "baichuan": "lm_head_normalized", "cohere": "qk_norm", "cohere2": "head_dim", "glm": "head_dim",
    "gemma2": "attention_scaling", "gemma3": "attention_scaling", "gemma3, capped": "attention_scaling",
    "embedding gemma": "attention_scaling",
    "t5": "decoder.lm_head_input_scale", "t5 1.1": "decoder.num_hidden_layers", "umt5": "decoder.lm_head_input_scale",
}  # fmt: skip
REFUSED_PRESETS = {"vanilla", "deepnorm", "opt", "bloom", "mpt", "gptj", "palm", "falcon", "nanochat", "exaone4"}
QUICK = ("llama 3.1", "gemma2", "gpt2", "falcon 40b", "distilbert")


def written(model, folder, quantization=None, tokenizer=None, reference=None):
    """What the export's own check says of a model's file."""
    folder.mkdir(exist_ok=True)
    room.write(model, tokenizer, folder, quantization)
    checks, _ = room.prove(folder, in_float32(reference or model), tokenizer, quantization)
    assert checks
    return checks


def failed(checks):
    return [f"{check.name}: {check.detail}" for check in checks if not check.ok]


def variant(title):
    return from_native(stock(title))


def small(**fields):
    """A decoder with every matrix of whole blocks and weights that hide nothing."""
    config = VariantConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 320, **fields})
    torch.manual_seed(0)
    return hostile_((VariantForCausalLM if config.is_causal else VariantForMaskedLM)(config)).eval()


@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=[] if title in QUICK else [pytest.mark.whole]) for title in MODELS]
)
def test_every_architecture_is_read_back_bit_for_bit_or_refused(title, tmp_path):
    if title == "bert":
        # Its bare class is converted with a pooler, which a file leaves out.
        drawn = (random_native(all_rows()["bert"], seed) for seed in itertools.count())
        model = from_native(next(native for native in drawn if native.config.hidden_act == "gelu"))
    else:
        model = variant(title)
    if title in REFUSED:
        with pytest.raises(NotRepresentable) as caught:
            room.refuse_unrepresentable(model.config)
        assert REFUSED[title] in caught.value.fields
        return
    checks = written(model, tmp_path / "out")
    assert not failed(checks)
    assert {check.name for check in checks} >= {"config", "tensors of the file", "outputs of the file"}
    if title != "bert":
        assert GGUFFile(tmp_path / "out" / room.FILE).architecture == MODELS[title][0]


# The same types with what the runtime computes.
TAKEN = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "gemma3, capped": {"query_pre_attn_scalar": 16},
    "embedding gemma": {"query_pre_attn_scalar": 16},
    "mistral with a window": {"sliding_window": 64},
    "phi3": {"sliding_window": 64},
    "starcoder2": {"sliding_window": 64},
    "exaone4": {"num_hidden_layers": 64},
    "cohere": {"use_qk_norm": False},
    "cohere2": {"head_dim": 8},
    "glm": {"head_dim": 8},
    "t5 1.1": {"num_decoder_layers": 2, "decoder_start_token_id": 0},
}


@pytest.mark.whole
@pytest.mark.parametrize("title", TAKEN)
def test_what_is_refused_is_taken_where_the_runtime_computes_it(title, tmp_path, monkeypatch):
    architecture, model_type, values, extra = MODELS[title]
    monkeypatch.setitem(MODELS, title, (architecture, model_type, {**values, **TAKEN[title]}, extra))
    assert not failed(written(variant(title), tmp_path / "out"))


@pytest.mark.whole
@pytest.mark.parametrize("model_type", all_rows())
def test_every_native_type_is_read_back_or_refused(model_type, tmp_path):
    outcomes = []
    for seed in range(3):
        model = from_native(random_native(all_rows()[model_type], seed), dtype=torch.float32)
        try:
            room.refuse_unrepresentable(model.config)
        except NotRepresentable as refusal:
            outcomes.append(refusal.fields)
            continue
        outcomes.append(failed(written(model, tmp_path / str(seed))))
    assert all(isinstance(outcome, dict) or not outcome for outcome in outcomes), outcomes


@pytest.mark.whole
@pytest.mark.parametrize("name", presets())
def test_every_preset_is_read_back_or_refused(name, tmp_path):
    config = VariantConfig.from_preset(name, **{**SIZES, "num_hidden_layers": 4})
    if name in REFUSED_PRESETS:
        with pytest.raises(NotRepresentable):
            room.refuse_unrepresentable(config)
        return
    model = (VariantForCausalLM if config.is_causal else VariantForMaskedLM)(config)
    assert not failed(written(hostile_(model).eval(), tmp_path / "out"))


# Number formats


@pytest.mark.parametrize("quantization", ["f16", "bf16", "q8_0"])
def test_matrices_are_in_the_format_asked_for(quantization, tmp_path):
    model = small(intermediate_size=80)
    assert not failed(written(model, tmp_path / "out", quantization))
    kinds = {name: info.kind for name, info in GGUFFile(tmp_path / "out" / room.FILE).tensors.items()}
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == quantization.upper()
    # 80 columns are no whole blocks of 32.
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if quantization == "q8_0" else quantization.upper())


def test_blocks_are_rounded_here_as_the_package_rounds_them():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 96, generator=generator) * 10.0 ** torch.randint(-6, 4, (64, 1), generator=generator)
    # A block of zeros, and one with values halfway between two steps.
    values[0], values[1, :32] = 0.0, torch.arange(32) - 16.5
    values[1, 0] = 127.0
    kind = gguf.GGMLQuantizationType.Q8_0
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(values.numpy(), kind), kind))
    ours = proof.FORMATS["Q8_0"].round(values)
    assert torch.equal(ours, theirs)
    error = proof.FORMATS["Q8_0"].error(values)
    # The step is in half precision, whose smallest number is a bound of its own.
    assert ((values - theirs).abs() <= error + 127 * 2.0**-25).all()
    assert ((values - theirs).abs() > 0.9 * error).any()


@pytest.mark.parametrize("change", ["one step", "the scale of a block", "another order"])
def test_blocks_that_say_something_else_are_caught(change, tmp_path, monkeypatch):
    model, quantize = small(), gguf.quantize

    def changed(array, kind):
        made = quantize(array, kind)
        if kind != gguf.GGMLQuantizationType.Q8_0 or array.shape != (96, 64):
            return made
        if change == "one step":
            made[5, 7] ^= 1
        elif change == "the scale of a block":
            made[5, 0] ^= 1
        else:
            made = made[::-1].copy()
        return made

    monkeypatch.setattr(gguf, "quantize", changed)
    (tensors,) = (each for each in written(model, tmp_path / "out", "q8_0") if each.name == "tensors of the file")
    assert not tensors.ok


@pytest.mark.parametrize("quantization", ["f16", "bf16", "q8_0"])
def test_outputs_are_as_far_off_as_rounding_explains(quantization, tmp_path):
    model = in_float32(small())
    path = tmp_path / "out" / room.FILE
    checks = {check.name: check for check in written(model, path.parent, quantization)}
    assert checks["outputs of the file"].ok
    read = from_native(path, dtype=torch.float32)
    _, errors = proof._tensors(path, model, read)
    assert len(errors) == sum(parameter.ndim > 1 for parameter in read.parameters())
    assert proof._outputs(model, read, errors).ok
    read.model.layers[0].self_attn.scaling *= 1.5
    assert not proof._outputs(model, read, errors).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_stays_so_bit_for_bit(dtype, tmp_path):
    model = small()
    # The parameters alone, as a checkpoint in half precision loads: frequencies of the rotation stay in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not failed(written(model, tmp_path / "out"))
    read = from_native(tmp_path / "out" / room.FILE)
    assert read.dtype == dtype
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.state_dict().items())


def test_what_llama_cpp_reads_in_float32_alone_stays_so():
    for name in (
        "position_embd.weight",
        "token_types.weight",
        "enc.blk.0.attn_rel_b.weight",
        "blk.0.attn_q_norm.weight",
    ):
        assert format_of(name, (32, 64), "Q8_0") == "F32"


# What a file says and llama.cpp computes


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"attention_sinks": True}, "attention_sinks"),
        ({"ffn_sub_norm": True}, "ffn_sub_norm"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
        ({"layer_types": "SF", "sliding_window": 8}, "layer_types"),
        ({"layer_types": "SS", "sliding_window": 8}, "sliding_window"),
        ({"hidden_act": "relu2"}, "hidden_act"),
        ({"attention_gate": "headwise"}, "attention_gate"),
        ({"per_layer_config": {1: {"skip": ["mlp"]}}}, "skip"),
        ({"norm_type": "dynamic_tanh"}, "norm_type"),
    ],
    ids=str,
)
def test_a_field_that_no_architecture_has_is_refused_by_name(fields, named):
    with pytest.raises(NotRepresentable, match=named):
        room.refuse_unrepresentable(VariantConfig(**{**GROUPED, **fields}))


@pytest.mark.parametrize(
    ("architecture", "preset", "fields", "named"),
    [
        ("gptneox", "gpt-neox", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("gemma2", "gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("smollm3", "smollm3", {"mlp_output_bias": True}, "mlp_output_bias"),
        ("starcoder2", "starcoder2", {"attention_output_bias": False}, "attention_output_bias"),
        ("qwen2", "qwen2", {"attention_output_bias": True}, "attention_output_bias"),
        ("olmo2", "olmo2", {"head_dim": 16}, "head_dim"),
    ],
)
def test_what_llama_cpp_does_not_load_is_refused_by_field(architecture, preset, fields, named):
    plain = {**SIZES, "num_hidden_layers": 4}
    assert not unread(VariantConfig.from_preset(preset, **plain), architecture)
    assert unread(VariantConfig.from_preset(preset, **{**plain, **fields}), architecture).keys() == {named}


def test_rope_of_any_fixed_frequencies_becomes_divisors(tmp_path):
    """Llama 3's with other bands than the published ones, which no key of a file says."""
    parameters = {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    model = small(rope_parameters=parameters)
    assert not failed(written(model, tmp_path / "out"))
    assert "rope_freqs.weight" in GGUFFile(tmp_path / "out" / room.FILE).tensors


OWN_SIZES = {
    1: {"num_attention_heads": 6, "num_key_value_heads": 3},
    2: {"skip": ["self_attn"]},
    3: {"intermediate_size": 64},
    4: {"num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 128},
}


@pytest.mark.parametrize("quantization", [None, pytest.param("q8_0", marks=pytest.mark.whole)])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention_bias": True, "attention_output_bias": True, "tie_word_embeddings": True},
        rope("linear", factor=2.0),
    ],
    ids=str,
)
def test_layers_that_differ_in_their_sizes(fields, quantization, tmp_path):
    sizes = {"num_hidden_layers": 5, "num_key_value_heads": 2, "head_dim": 16, "per_layer_config": OWN_SIZES}
    assert not failed(written(small(**sizes, **fields), tmp_path / "out", quantization))
    file = GGUFFile(tmp_path / "out" / room.FILE)
    assert file.architecture == "deci"
    assert file.metadata["deci.attention.head_count"] == [4, 6, 0, 4, 5]
    assert file.metadata["deci.attention.head_count_kv"] == [2, 3, 0, 2, 1]
    assert file.metadata["deci.feed_forward_length"] == [96, 96, 96, 64, 128]
    assert not [name for name in file.tensors if name.startswith("blk.2.attn")]


@pytest.mark.parametrize(
    ("own", "fields", "named"),
    [
        ({"skip": ["mlp"]}, {}, "per_layer_config"),
        ({"hidden_act": "gelu"}, {}, "per_layer_config"),
        ({"intermediate_size": 64}, {"hidden_act": "gelu"}, "hidden_act"),
        ({"intermediate_size": 64}, {"norm_placement": "post"}, "norm_placement"),
        # Nearer are those that have these, and layers that are alike.
        ({"intermediate_size": 64}, {"qk_norm": "head"}, "per_layer_config"),
        ({"intermediate_size": 64}, {"layer_types": "SF", "sliding_window": 8}, "per_layer_config"),
    ],
    ids=str,
)
def test_layers_that_differ_otherwise_are_refused(own, fields, named):
    with pytest.raises(NotRepresentable) as caught:
        room.refuse_unrepresentable(VariantConfig(**{**GROUPED, "per_layer_config": {1: own}, **fields}))
    assert named in caught.value.fields


def test_a_window_as_wide_as_the_context_is_none(tmp_path):
    model = small(layer_types="SS", sliding_window=SIZES["max_position_embeddings"])
    assert not failed(written(model, tmp_path / "out"))


def test_keys_have_the_names_of_the_package():
    groups = [group for group in vars(gguf.Keys).values() if isinstance(group, type)]
    values = [value for group in groups for value in vars(group).values() if isinstance(value, str)]
    known = {value.replace("{arch}", "llama") for value in values}
    config = VariantConfig(**GROUPED, layer_types="SF", sliding_window=8, clip_qkv=1.0, **rope("linear", factor=2.0))
    assert file_keys.keys_for(config, "llama").keys() <= known


def test_every_architecture_that_is_read_names_its_types():
    for name, entry in ARCHITECTURES.items():
        assert entry.native_types, name


# The check


# With fewer layers, Gemma 3 has none without a window, and no use for the other base.
MUTATED = {
    "llama yarn": {},
    "gemma3, capped": {"num_hidden_layers": 6, "query_pre_attn_scalar": 16},
    "gpt2": {},
    "granite": {},
    "modern-bert": {},
}


@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=[] if title == "llama yarn" else [pytest.mark.whole]) for title in MUTATED]
)
def test_every_key_that_says_something_else_is_caught(title, tmp_path, monkeypatch):
    architecture, model_type, values, extra = MODELS[title]
    monkeypatch.setitem(MODELS, title, (architecture, model_type, {**values, **MUTATED[title]}, extra))
    model = variant(title)
    write_file = room.write_file
    target = room.target_of(model.config)
    for key, value in target.keys.items():
        if key.startswith("tokenizer."):
            # Ids of tokens enter no arithmetic.
            continue
        other = {
            bool: lambda v: not v,
            int: lambda v: 2 * v + 1,
            float: lambda v: v * 1.5,
            str: lambda v: v + "x",
        }.get(type(value), lambda v: [not entry for entry in v])(value)

        def changed(path, name, keys, *rest, key=key, other=other):
            return write_file(path, name, {**keys, key: other}, *rest)

        monkeypatch.setattr(room, "write_file", changed)
        assert failed(written(model, tmp_path / "out")), key
        (tmp_path / "out" / room.FILE).unlink()


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("llama 3.1", ["rope_freqs.weight", "blk.1.attn_k.weight", "output.weight"]),
        pytest.param("llama 3.1", None, marks=pytest.mark.whole),
        pytest.param("gpt2", None, marks=pytest.mark.whole),
    ],
)
def test_a_tensor_that_is_another_is_caught(title, names, tmp_path, monkeypatch):
    model = variant(title)
    write_file = room.write_file
    written(model, tmp_path / "names")
    for name in names or GGUFFile(tmp_path / "names" / room.FILE).tensors:

        def changed(path, architecture, keys, tensors, wanted, name=name):
            tensors = [(each, tensor.flip(-1) if each == name else tensor) for each, tensor in tensors]
            return write_file(path, architecture, keys, tensors, wanted)

        monkeypatch.setattr(room, "write_file", changed)
        assert failed(written(model, tmp_path / "out")), name


# What files of the architectures that come nearest say of such a model. "GLU" is the base, and has no file without it.
SAID = (
    "epsilon", "residual multiplier", "biases", "QK-norm", "scaling", "theta", "interleaved", "linear", "yarn", "llama3",
    "QK-norm after the rotation",
)  # fmt: skip
# What llama.cpp's deci says, with tests of its own.
IN_DECI = ("heads that differ",)


@pytest.mark.whole
@pytest.mark.parametrize("feature", SAID)
def test_a_feature_is_written_and_missed_where_it_is_off(feature, tmp_path):
    """The mutation: the same weights written without the feature do not pass for the model that has it."""
    on, off = with_and_without(*{**FEATURES, **RARER}[feature])
    assert not failed(written(on, tmp_path / "on"))
    assert failed(written(off, tmp_path / "off", reference=on))


@pytest.mark.whole
@pytest.mark.parametrize("feature", [name for name in {**FEATURES, **RARER} if name not in (*SAID, "GLU", *IN_DECI)])
def test_a_feature_that_no_file_says_is_refused(feature):
    on, _ = with_and_without(*{**FEATURES, **RARER}[feature])
    with pytest.raises(NotRepresentable):
        room.refuse_unrepresentable(on.config)


# On disk


def byte_pairs():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>", "<|role|>"],
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(["the quick brown fox and the dog " * 20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", bos_token="<|end|>", pad_token="<|end|>",
        additional_special_tokens=["<|role|>"], chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )  # fmt: skip


def sentencepiece():
    alphabet = [chr(number) for number in range(97, 123)]
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *alphabet,
        "th",
        "the",
        "\u2581the",
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("make", [byte_pairs, sentencepiece])
def test_a_folder_is_exported_with_its_tokenizer_and_comes_back(make, tmp_path):
    model, tokenizer = small(eos_token_id=0, bos_token_id=0), make()
    model.save_pretrained(tmp_path / "variant")
    tokenizer.save_pretrained(tmp_path / "variant")
    report = export_to_engine(tmp_path / "variant", tmp_path / "out", "gguf", quantization="f32")
    assert report.ok
    assert "tokenizer of the file" in {check.name for check in report.checks}
    hf_variants.conversion.convert(tmp_path / "out" / room.FILE, tmp_path / "back")
    back = PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")
    for text in ("the quick brown 123 fox", "<|role|>the dog", "  naïve 北京"):
        assert back(text).input_ids == tokenizer(text).input_ids
    assert back.chat_template == tokenizer.chat_template
    weights = VariantForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_record_says_what_was_checked_and_the_card_names_the_engine(tmp_path):
    small().save_pretrained(tmp_path / "variant")
    report = export_to_engine(tmp_path / "variant", tmp_path / "out", "gguf")
    record = read_record(tmp_path / "out")
    assert record["direction"] == "export"
    assert record["claims"]["weights"] == "verified"
    assert [check["name"] for check in record["verification"]["checks"]] == [check.name for check in report.checks]
    assert room.FILE in record["sha256"]
    assert record["source"] == "variant"
    assert str(tmp_path) not in json.dumps(record)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "gguf" in card
    assert "llama.cpp" in card


def test_the_command_writes_for_every_engine_that_there_is(tmp_path, capsys):
    assert hf_variants_cli.ENGINES == ENGINES
    small().save_pretrained(tmp_path / "variant")
    arguments = [str(tmp_path / "variant"), str(tmp_path / "out"), "--engine", "gguf", "--quantization", "f16"]
    assert hf_variants_cli.main(["export", *arguments]) == 0
    said = capsys.readouterr()
    assert "architecture llama" in said.out
    # The file is read back several times.
    assert said.err.count("Loading weights: 100%") <= 1


def test_what_differs_is_not_kept(tmp_path, monkeypatch):
    small().save_pretrained(tmp_path / "variant")
    write_file = room.write_file
    monkeypatch.setattr(
        room,
        "write_file",
        lambda path, name, keys, tensors, wanted: write_file(
            path, name, keys, [(n, t * 1.01) for n, t in tensors], wanted
        ),
    )
    with pytest.raises(VerificationFailed, match="tensors of the file"):
        export_to_engine(tmp_path / "variant", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_classifiers_and_other_formats_are_refused(tmp_path):
    model = VariantForSequenceClassification(VariantConfig(**SIZES, num_labels=2))
    with pytest.raises(ConversionError, match="VariantForSequenceClassification"):
        room.write(model, None, tmp_path, None)
    with pytest.raises(ConversionError, match="q8_0"):
        room.refuse_quantization("int8")

"""Keys of native configs: what the stock class reads, found in its source and held against the class itself."""

import copy
import json
import random
import re

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel

import hf_variants
import hf_variants_cli
from hf_variants.conversion import ConversionError, config_keys, convert, export, verify
from hf_variants.conversion.config_keys import reads_of
from hf_variants.conversion.config_map import (
    COMMON_KEYS,
    SHARED_KEYS,
    TOKEN_CLASSIFIER_DROPOUT,
    Irrelevant,
    OfDecoder,
    OnBothStacks,
    OnStack,
)
from hf_variants.conversion.family import all_families, all_families_and_parts, family_of

from .layouts import differences, native_of, saved
from .native_rows import all_rows
from .parity import hostile_, inputs_of, logits_of, random_native


LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}

# Keys of published configs that no class of their types reads.
JUNK = (
    "n_positions", "sliding_window_size", "pretraining_tp", "torchscript", "use_bfloat16", "prefix", "output_past",
    "is_llama_config", "_num_labels", "finetuning_task", "tf_legacy_loss", "directionality", "rope_interleaved",
    "_attn_implementation_autoset", "unsloth_version", "attn_logit_softcapping_", "transformers.js_config",
    "tie_encoder_decoder", "model_max_length", "use_flash_attn", "eos_token_ids", "mlp_type", "task_specific_params",
)  # fmt: skip


def sample(rng: random.Random):
    return rng.choice([True, False, None, 0, 3, 17.5, "yes", [1, 2], {"a": 1}])


def irrelevant(entry) -> list[Irrelevant]:
    """The entries of keys without effect in one entry of a family, also in what wraps it for a stack."""
    if isinstance(entry, OnBothStacks):
        entry = entry.stacks[0]
    inner = [entry.entry] if isinstance(entry, OfDecoder) else entry.entries if isinstance(entry, OnStack) else []
    return [entry] if isinstance(entry, Irrelevant) else [found for one in inner for found in irrelevant(one)]


def test_no_entry_says_what_the_source_of_the_classes_says():
    """Keys that no class reads need an entry only where the entry hides them from something else."""
    hidden = {*SHARED_KEYS, *COMMON_KEYS, *TOKEN_CLASSIFIER_DROPOUT, *vars(GenerationConfig())}
    needed: dict[tuple, list[bool]] = {}
    for family in all_families_and_parts():
        entries = [one for entry in family.config for one in irrelevant(entry)]
        if family.own_config is not None or not entries:
            continue
        config, keys = family.config_map.native_class(), [entry.keys[0] for entry in entries]
        found = [
            config_keys.verdicts(config, dict.fromkeys(keys, value), family._readers(head))
            for head in family.converted_heads
            for value in (True, 7)
        ]
        for key, reason in zip(keys, (entry.reason for entry in entries)):
            is_read = {verdicts[key] for verdicts in found} != {config_keys.IDLE}
            elsewhere = key in hidden or config_keys.positions_of(key, "other") is not None
            needed.setdefault((key, reason), []).append(is_read or elsewhere)
    # CodeGen's class reads it no more.
    unread = {"n_ctx"} if Version(transformers.__version__) >= Version("5.24") else set()
    assert {key for (key, _), places in needed.items() if not any(places)} == unread
    assert any(places == [True] for places in needed.values())


@pytest.mark.parametrize("model_type", [*all_families()])
def test_keys_that_are_not_read_change_nothing(model_type):
    """The verdict is held against the class: any value leaves its outputs and its generated tokens as they are."""
    row, family = all_rows()[model_type], all_families()[model_type]
    if family.own_config is not None:
        pytest.skip("its class does not run here")
    native, rng = random_native(row, 1), random.Random(model_type)
    config = copy.deepcopy(native.config)
    declared = set(config.to_dict())
    for key in JUNK:
        if key not in declared:
            setattr(config, key, sample(rng))
    unread = family.config_map.unread(config, family.primary)
    reads = reads_of(type(config), (type(native),)).names
    translated = {key for entry in family.config for key in entry.keys}
    # Declared and read by no code: the tokenizer's ids, notes of the training code.
    for key in unread.keys() & declared - reads:
        if isinstance(value := getattr(config, key), (bool, int, float)):
            setattr(config, key, type(value)(rng.random() * 9))
    assert translated | set(unread) >= {key for key in JUNK if key not in declared and key not in reads}
    changed = type(native)(config).eval()
    changed.load_state_dict(native.state_dict())
    inputs = inputs_of(native, 16)["long"]
    assert torch.equal(logits_of(native, inputs), logits_of(changed, inputs))
    if native.can_generate():
        ids = inputs["input_ids"][:, :8]
        made = [model.generate(ids, max_new_tokens=2, do_sample=False) for model in (native, changed)]
        assert torch.equal(*made)


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with more keys in its config than its class knows."""

    def write(**more) -> str:
        hostile_(LlamaForCausalLM(LlamaConfig(**LLAMA))).save_pretrained(tmp_path / "native")
        path = tmp_path / "native" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
        return str(tmp_path / "native")

    return write


def test_what_is_not_read_is_kept_and_reported(folder, tmp_path):
    source = folder(n_positions=5, pruned_heads={}, my_note={"a": [1]}, attn_logit_softcapping=50.0)
    report = convert(source, tmp_path / "variant", verify=True)
    assert report.unread.keys() == {"n_positions", "pruned_heads", "my_note", "attn_logit_softcapping"}
    assert all(f"`{key}`" in report.to_markdown() for key in report.unread)
    export(tmp_path / "variant", tmp_path / "back")
    ours, theirs = (AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path / "back", source))
    assert {key for key, value in theirs.items() if ours.get(key) != value} == {"_name_or_path"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_causal", False),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
        ("sliding_window", 16),
        ("attention_chunk_size", 16),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_a_switch_is_refused_and_not_to_be_ignored(folder, tmp_path, key, value):
    source = folder(**{key: value})
    for ignored in ((), (key,)):
        with pytest.raises(ConversionError, match=f"`{key}`") as refusal:
            convert(source, tmp_path / "variant", ignore_keys=ignored)
        assert "ignore" not in str(refusal.value)


@pytest.mark.parametrize(
    "more",
    [
        {"is_causal": True, "add_cross_attention": False, "attention_chunk_size": None, "sliding_window": None},
        {"sliding_window": 4096},
        {"layer_types": ["full_attention"] * 2, "original_max_position_embeddings": 2048},
        {"gradient_checkpointing": True, "initializer_factor": 3.0, "sep_token_id": 3},
    ],
)
def test_values_that_change_nothing_are_no_obstacle(folder, more):
    assert hf_variants.from_native(folder(**more)) is not None


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5", "bert"])
def test_every_name_that_is_read_is_found_in_the_text(model_type):
    family = all_families()[model_type]
    config_class, classes = family.native_class(family.primary).config_class, family.config_map.readers(family.primary)
    names = reads_of(config_class, classes).names | config_keys._reads_itself(config_class)
    assert len(names) > 50
    modules = {found.__module__ for found in (*classes, *config_class.__mro__[:-1])}
    text = "\n".join(config_keys._texts(tuple(sorted(modules))))
    assert not names - set(re.findall(r"(?:\.\s*|[\"'])(\w+)\b", text))
    assert not config_keys._are_mentioned(frozenset({"new_gate"}), config_class, classes)


def test_what_is_read_and_not_understood_is_refused_unless_ignored(folder, tmp_path, monkeypatch):
    plain = config_keys.reads_of

    def with_another_read(*classes):
        reads = plain(*classes)
        return config_keys.Reads(reads.names | {"new_gate"}, reads.defaults)

    texts = config_keys._texts
    monkeypatch.setattr(config_keys, "reads_of", with_another_read)
    monkeypatch.setattr(config_keys, "_texts", lambda names: (*texts(names), "self.gate = config.new_gate"))
    source = folder(new_gate=True, note="hello")
    with pytest.raises(ConversionError, match=r"\['new_gate'\].*ignore_keys.*--ignore-key"):
        convert(source, tmp_path / "variant")
    convert(source, tmp_path / "variant", ignore_keys=["new_gate"])
    assert verify(source, tmp_path / "variant", new_tokens=0, progress=False).ok


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("gpt_neo", {"rotary": True, "rotary_dim": 64}),
        ("bert", {"position_embedding_type": "alibi"}),
        ("bert", {"position_embedding_type": "relative_key"}),
        ("gpt2", {"alibi": True}),
        ("opt", {"use_rotary_position_embeddings": True}),
    ],
)
def test_positions_of_another_model_are_refused(model_type, more):
    family = family_of(model_type)
    with pytest.raises(ConversionError, match=next(iter(more))):
        family.config_map.to_variant(family.config_map.native_class(**more))


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("bert", {"position_embedding_type": "absolute", "rotary": False, "rope_scaling": None}),
        ("llama", {"position_embedding_type": "rope", "rope_interleaved": True, "rotary_dim": 8}),
        ("gpt2", {"alibi": False}),
    ],
)
def test_positions_of_its_own_are_not(model_type, more):
    family = family_of(model_type)
    family.config_map.to_variant(family.config_map.native_class(**more))


def test_a_nested_config_is_looked_through():
    family = family_of("t5gemma")
    config = family.config_map.native_class()
    config.encoder.n_positions = 512
    assert "encoder.n_positions" in family.config_map.unread(config)
    config.encoder.is_causal = False
    with pytest.raises(ConversionError, match=r"encoder\.is_causal"):
        family.config_map.to_variant(config)


def test_commands_whose_messages_name_the_option_have_it():
    parser = hf_variants_cli.build_parser()
    for argv in (["convert", "a", "b"], ["verify", "a", "b"], ["generate", "a", "text"], ["chat", "a"]):
        assert parser.parse_args([*argv, "--ignore-key", "k", "--ignore-key", "l"]).ignore_keys == ["k", "l"]


# The names of architectures


@pytest.mark.parametrize(
    ("model_type", "name", "head"),
    [
        ("ernie4_5", "Ernie4_5_ForCausalLM", "causal_lm"),
        ("bert", "BertForPreTraining", "masked_lm"),
        ("bert", "BertForMultipleChoice", "multiple_choice"),
        ("bert", "BertForNextSentencePrediction", "next_sentence_prediction"),
        ("roberta", "RobertaForCausalLM", "causal_lm"),
        ("electra", "ElectraForPreTraining", "base"),
        ("gpt2", "GPT2DoubleHeadsModel", "causal_lm"),
        ("bart", "BartForSequenceClassification", "sequence_classification"),
        ("llama", "LLaMAForCausalLM", "causal_lm"),
        ("llama", "MistralForCausalLM", "causal_lm"),
        ("t5", "T5WithLMHeadModel", "seq2seq_lm"),
        ("falcon", "RWForCausalLM", "causal_lm"),
        ("qwen2", "Qwen2ForProcessRewardModel", "base"),
    ],
)
def test_names_of_architectures_that_transformers_loads(model_type, name, head):
    family = family_of(model_type)
    assert family.head_of(name) == head
    whole = (
        "BartForSequenceClassification", "BertForMultipleChoice", "BertForNextSentencePrediction", "RobertaForCausalLM",
    )  # fmt: skip
    told = name not in whole and (
        name not in ("Ernie4_5_ForCausalLM", "LLaMAForCausalLM") or family.primary != "causal_lm"
    )
    assert (name in family.taken_part(name, head)) == told


def test_the_type_of_a_config_without_one_is_that_of_its_class(tmp_path):
    model = native_of("xlm-roberta", "sequence_classification")
    saved(model, tmp_path / "native")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "native" / "config.json").write_text(json.dumps(config))
    assert differences(tmp_path / "native", model) == []
    assert convert(tmp_path / "native", tmp_path / "variant", verify=True).exactness == "bit-exact"
    (tmp_path / "native" / "config.json").write_text(json.dumps({**config, "architectures": ["RemBertForRanking"]}))
    with pytest.raises(ConversionError, match="no `model_type`"):
        convert(tmp_path / "native", tmp_path / "other")


def test_a_part_in_memory():
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    native = hostile_(BertForPreTraining(config)).eval()
    ours = hf_variants.from_native(native)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(native(ids).prediction_logits, ours(ids).logits)


def test_the_encoder_alone_of_an_encoder_decoder(tmp_path):
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )  # fmt: skip
    native = hostile_(T5EncoderModel(config)).eval()
    native.save_pretrained(tmp_path / "native")
    report = convert(tmp_path / "native", tmp_path / "variant", verify=True)
    assert report.verification.ok
    ids, mask = torch.arange(140).view(2, 70) % 60 + 2, torch.ones(2, 70)
    mask[0, 50:] = 0
    ours = hf_variants.VariantModel.from_pretrained(tmp_path / "variant").eval()
    with torch.no_grad():
        made = [model(ids, attention_mask=mask).last_hidden_state for model in (native, ours)]
    assert torch.equal(*made)
    export(tmp_path / "variant", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "native/model.safetensors"
    ).read_bytes()
    saved = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("native", "back")]
    assert saved[0] == saved[1]
    assert type(hf_variants.to_native(ours)) is T5EncoderModel

"""Adapters of native models on their variants and back: every method's cell of docs/adapters.md, and what configs say."""

import copy
import io
import json
from pathlib import Path

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    BertConfig,
    BertForSequenceClassification,
    MarianConfig,
    MarianMTModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import hf_variants_cli
from hf_variants import VariantForMultipleChoice
from hf_variants.conversion import ConversionError, convert, convert_adapter, export_adapter, from_native, load_adapter
from hf_variants.text_generation import generate
from tests import adapter_table
from tests.adapter_table import METHODS, TYPES, adapter_of, outputs, trained
from tests.parity import hostile_, logits_of
from tests.tools import kinds


PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
QUICK = [
    ("LoRA", "llama"), ("LoRA", "gpt2"), ("LoRA, all-linear", "phi3"), ("LoRA, all-linear", "t5"), ("DoRA", "gpt_neox"),
    ("IA3", "bert"), ("IA3", "gpt_neox"), ("LoHa", "falcon"), ("OFT", "gpt_neox"), ("AdaLoRA", "gpt_neox"),
    ("VeRA", "llama"),    ("LN-tuning", "bart"), ("prefix tuning", "qwen2"), ("LoRA", "roberta"), ("LoKr", "phi3"),
]  # fmt: skip


def shown(name: str, model_type: str) -> str:
    """What the page says."""
    rows = [
        [part.strip() for part in line.strip("|").split("|")] for line in PAGE.read_text().splitlines() if "|" in line
    ]
    return next(row for row in rows if row[0] == name)[rows[0].index(model_type)]


@pytest.mark.parametrize(("name", "model_type"), QUICK)
def test_the_page_is_what_runs(name, model_type):
    assert adapter_table.run_cell(name, model_type) == shown(name, model_type)


@pytest.mark.whole
@pytest.mark.exhaustive
def test_the_whole_page_is_what_runs():
    assert adapter_table.page(adapter_table.run_cell) == PAGE.read_text()


def test_the_page_has_every_cell():
    assert not {cell for name in METHODS for t in TYPES for cell in shown(name, t).split(" / ")} - {
        "=", "~", "refused", "n/a"
    }  # fmt: skip


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """A native checkpoint, its variant's, and their folders."""
    folder = tmp_path_factory.mktemp("base")
    config = Qwen2Config(**SIZES, num_key_value_heads=2, intermediate_size=48, tie_word_embeddings=True)
    hostile_(Qwen2ForCausalLM(config)).save_pretrained(folder / "native")
    kinds.tokenizer().save_pretrained(folder / "native")
    convert(folder / "native", folder / "variant")
    return folder


CONFIGS = {
    "regular expression": {"target_modules": r".*\.(q_proj|up_proj)"},
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 5}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "tokens by module": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_what_a_config_names_is_found_on_the_other_side(options, qwen2, tmp_path):
    native = AutoModelForCausalLM.from_pretrained(qwen2 / "native")
    wrapped = trained(native, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=7, **options))
    expected = outputs(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter", safe_serialization=True)
    convert_adapter(tmp_path / "adapter", tmp_path / "ours", onto=qwen2 / "variant")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(loaded.get_base_model()).__name__ == "VariantForCausalLM"
    assert torch.equal(outputs(loaded), expected)
    export_adapter(tmp_path / "ours", tmp_path / "back", onto=qwen2 / "native")
    back = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(outputs(back), expected)
    first, again = adapter_of(wrapped).tensors, adapter_of(back).tensors
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [(BertForSequenceClassification, BertConfig), (RobertaForSequenceClassification, RobertaConfig)],
)
def test_a_classifier_on_a_base_that_is_none(model_class, config, tmp_path):
    """The checkpoint is a language model; number of labels and head are the adapter's."""
    config = config(
        **SIZES, intermediate_size=48, architectures=[model_class.__name__.partition("For")[0] + "ForMaskedLM"]
    )
    config.save_pretrained(tmp_path / "base")
    config = copy.deepcopy(config)
    config.num_labels = 5
    native = hostile_(model_class(config)).eval()
    wrapped = trained(copy.deepcopy(native), LoraConfig(task_type="SEQ_CLS", r=4))
    wrapped.save_pretrained(tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", tmp_path / "ours", base=tmp_path / "base")
    loaded = PeftModel.from_pretrained(from_native(native), tmp_path / "ours").eval()
    assert torch.equal(outputs(loaded), outputs(wrapped))
    assert "score" in json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["modules_to_save"]


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert"])
def test_what_chooses_is_to_peft_a_classifier(model_type, tmp_path):
    """There and back, though the head is another one than that of the task."""
    config = CONFIG_MAPPING[model_type](vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    native_class = AutoModelForMultipleChoice._model_mapping[type(config)]
    hostile_(native_class(config)).save_pretrained(tmp_path / "native")
    native = native_class.from_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant")
    ids = torch.randint(3, 96, (2, 3, 9), generator=torch.Generator().manual_seed(1))
    # What ELECTRA has in front of its classifier is no name that PEFT knows, and is saved whole on the other side.
    extra = {"modules_to_save": ["sequence_summary"]} if model_type == "electra" else {}
    targets = ["q_lin", "query", "lin1", "value"]
    wrapped = trained(native, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets, **extra))
    expected = logits_of(wrapped, {"input_ids": ids})
    wrapped.save_pretrained(tmp_path / "adapter")
    report = convert_adapter(tmp_path / "adapter", tmp_path / "ours", base=tmp_path / "native")
    assert report.whole == (2 if model_type in ("bert", "roberta") else 4)
    ours = VariantForMultipleChoice.from_pretrained(tmp_path / "variant")
    loaded = PeftModel.from_pretrained(ours, tmp_path / "ours").eval()
    assert torch.equal(logits_of(loaded, {"input_ids": ids}), expected)
    export_adapter(tmp_path / "ours", tmp_path / "back", base=tmp_path / "variant")
    back = PeftModel.from_pretrained(native_class.from_pretrained(tmp_path / "native"), tmp_path / "back").eval()
    assert torch.equal(logits_of(back, {"input_ids": ids}), expected)
    assert adapter_of(back).tensors.keys() == adapter_of(wrapped).tensors.keys()


def test_a_classifier_of_sequences_on_a_base_that_chooses(tmp_path):
    """The adapter's own classifier tells, which has a row for every class."""
    config = BertConfig(**SIZES, intermediate_size=48, architectures=["BertForMultipleChoice"])
    config.save_pretrained(tmp_path / "base")
    native = hostile_(BertForSequenceClassification(config)).eval()
    wrapped = trained(copy.deepcopy(native), LoraConfig(task_type="SEQ_CLS", r=4))
    wrapped.save_pretrained(tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", tmp_path / "ours", base=tmp_path / "base")
    loaded = PeftModel.from_pretrained(from_native(native), tmp_path / "ours").eval()
    assert torch.equal(outputs(loaded), outputs(wrapped))


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_a_prompt_beside_words_of_another_size_is_refused(config, scales, tmp_path):
    """Marian multiplies ids alone, and PEFT looks the words up that its prompt stands before."""
    sizes = {f"{stack}_{what}": value for stack in ("encoder", "decoder")
             for what, value in {"layers": 1, "ffn_dim": 32, "attention_heads": 2}.items()}  # fmt: skip
    native = hostile_(
        MarianMTModel(MarianConfig(vocab_size=96, d_model=32, pad_token_id=0, scale_embedding=scales, **sizes))
    ).eval()
    native.save_pretrained(tmp_path / "base")
    wrapped = trained(native, config(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    wrapped.save_pretrained(tmp_path / "adapter")
    if scales and config is peft.PromptTuningConfig:
        with pytest.raises(ConversionError, match=r"MarianMTModel it gets them without `embedding_multiplier`"):
            convert_adapter(tmp_path / "adapter", tmp_path / "ours", base=tmp_path / "base")
        return
    convert_adapter(tmp_path / "adapter", tmp_path / "ours", base=tmp_path / "base")
    loaded = PeftModel.from_pretrained(from_native(native), tmp_path / "ours").eval()
    assert torch.equal(outputs(loaded), outputs(wrapped))


def opt_with_adapter(folder):
    torch.manual_seed(0)
    native = hostile_(OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, max_position_embeddings=64))).eval()
    native.save_pretrained(folder / "base")
    kinds.tokenizer().save_pretrained(folder / "base")
    native = OPTForCausalLM.from_pretrained(folder / "base").eval()
    wrapped = trained(native, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=2000))
    wrapped.save_pretrained(folder / "adapter")
    return wrapped


def test_generate_applies_the_adapter_of_a_native_model(tmp_path):
    wrapped = opt_with_adapter(tmp_path)
    tokenizer = kinds.tokenizer()
    ids = tokenizer("the cat sees", return_tensors="pt").input_ids
    tokens = wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)
    expected = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    options = {"max_new_tokens": 7, "do_sample": False}
    (text,) = generate(str(tmp_path / "adapter"), ["the cat sees"], options, out=io.StringIO())
    assert text.split() == expected.split()
    (bare,) = generate(str(tmp_path / "base"), ["the cat sees"], options, out=io.StringIO())
    assert bare.split() != text.split()


def test_an_adapter_that_does_not_belong_is_an_error(tmp_path, qwen2):
    wrapped = opt_with_adapter(tmp_path)
    tensors = adapter_of(wrapped).tensors
    with pytest.raises(ConversionError, match=r"does not fit|does not belong"):
        convert_adapter(tmp_path / "adapter", tmp_path / "ours", base=qwen2 / "native")
    # PEFT warns of a missing tensor, and loads the rest.
    name = next(iter(tensors))
    del tensors[name]
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ConversionError, match="lacks " + name.replace(".", r"\.")):
        load_adapter(from_native(wrapped.unload()), tmp_path / "adapter")


@pytest.mark.parametrize("side", ["native", "variant"])
def test_an_adapter_with_new_tokens(side, qwen2, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(qwen2 / side)
    tokenizer = kinds.tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(100)])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    wrapped = trained(model, LoraConfig(task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"]))
    expected = outputs(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(qwen2 / "variant"), tmp_path / "adapter")
    assert loaded.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert torch.equal(outputs(loaded), expected)
    assert generate(str(tmp_path / "adapter"), ["the new1"], {"max_new_tokens": 3}, out=io.StringIO())
    if side == "native":
        convert_adapter(tmp_path / "adapter", tmp_path / "ours", onto=qwen2 / "variant")
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
        assert torch.equal(outputs(again), expected)


def test_the_command_line(tmp_path, qwen2, capsys):
    opt_with_adapter(tmp_path)
    adapter, ours, back = (str(tmp_path / name) for name in ("adapter", "ours", "back"))
    convert(tmp_path / "base", tmp_path / "variant")
    variant = str(tmp_path / "variant")
    assert hf_variants_cli.main(["convert", adapter, ours, "--onto", variant]) == 0
    assert "opt -> variant" in capsys.readouterr().out
    assert hf_variants_cli.main(["export", ours, back]) == 0
    first, again = (peft.utils.load_peft_weights(folder, device="cpu") for folder in (adapter, back))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert hf_variants_cli.main(["convert", adapter, str(tmp_path / "x"), "--verify"]) == 2
    assert "--verify is for a model" in capsys.readouterr().err
    assert hf_variants_cli.main(["convert", str(tmp_path / "base"), str(tmp_path / "x"), "--onto", variant]) == 2
    assert "--onto is for an adapter" in capsys.readouterr().err


def test_what_cannot_be_moved_is_refused_by_name():
    native = adapter_table.native_model("gpt_neox")
    pair = adapter_table.Pair.of_native(native.config, "causal_lm")
    adapter = adapter_of(get_peft_model(native, LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pissa")))
    with pytest.raises(ConversionError, match=r"LORA adapter on gpt_neox.* initialised from the base's weights"):
        adapter_table.translate_adapter(adapter, pair, to_native=False)


def test_matrices_that_all_layers_share_do_not_follow_a_weight_that_lies_otherwise():
    native = adapter_table.native_model("gpt2")
    pair = adapter_table.Pair.of_native(native.config, "causal_lm")
    adapter = adapter_of(get_peft_model(native, VeraConfig(r=4, target_modules=["attn.c_proj"])))
    with pytest.raises(ConversionError, match=r"VERA adapter on .*c_proj has parameters that cannot be moved"):
        adapter_table.translate_adapter(adapter, pair, to_native=False)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_an_adapter_on_a_table_that_is_never_run_is_left_out(model_type):
    native = adapter_table.native_model(model_type)
    pair = adapter_table.Pair.of_native(native.config, "seq2seq_lm")
    options = {"task_type": "SEQ_2_SEQ_LM", "init_lora_weights": False}
    adapter = adapter_of(get_peft_model(native, LoraConfig(target_modules=["shared", "q", "q_proj"], **options)))
    made, _ = adapter_table.translate_adapter(adapter, pair, to_native=False)
    assert not any("embed" in name or "shared" in name for name in made.tensors)
    assert len(made.tensors) == len(adapter.tensors) - 2
    adapter = adapter_of(
        get_peft_model(adapter_table.native_model(model_type), LoraConfig(target_modules=["shared"], **options))
    )
    with pytest.raises(ConversionError, match=r"on .*shared, which .* never runs"):
        adapter_table.translate_adapter(adapter, pair, to_native=False)

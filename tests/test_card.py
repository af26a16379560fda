"""The model card of a saved variant: complete metadata, sizes, the proof of a conversion, and usage code that runs."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, StaticCache

import hf_variants_cli
from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForConditionalGeneration,
    VariantForMaskedLM,
    VariantForMultipleChoice,
    VariantForSequenceClassification,
    VariantPreTrainedModel,
    VariantSeq2SeqConfig,
)
from hf_variants.card import CARD, DRAWING, MARKER, is_by_hand, lineage_of, model_card, write_card
from hf_variants.conversion import ConversionError, VerificationFailed, convert, export, on_disk, verification
from hf_variants.conversion.record import RECORD, read_record, speaks_of
from hf_variants.preset_page import write_page
from hf_variants.sizes import cache_sizes, readable, sizes_in
from tests import gguf_files
from tests.test_custom_code import MODELS, SIZES
from tests.tools import kinds


ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"
RESULT = EvalResult(
    task_type="text-generation", dataset_type="wikitext", dataset_name="WikiText", metric_type="perplexity",
    metric_value=12.5, dataset_split="test",
)  # fmt: skip


def saved(folder: Path, **fields) -> VariantForCausalLM:
    model = VariantForCausalLM(VariantConfig(**{**SIZES, **fields}))
    model.save_pretrained(folder)
    return model


def run_usage(folder: Path, monkeypatch) -> str:
    """Run a card's code beside its folder, offline, in a fresh interpreter; return what it prints."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / CARD).read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(folder.parent / "home"))
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, cwd=folder.parent
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


# Each in a process of its own.
@pytest.mark.parametrize(
    "auto_class",
    [pytest.param(name, marks=pytest.mark.whole if number else ()) for number, name in enumerate(MODELS)],
)
def test_usage_code_runs(auto_class, tmp_path, monkeypatch):
    MODELS[auto_class]().save_pretrained(tmp_path / "model")
    assert auto_class in (tmp_path / "model" / CARD).read_text(encoding="utf-8")
    shown = "torch.Size([1, 3, 71])" if auto_class == "AutoModelForMaskedLM" else "tensor([["
    assert run_usage(tmp_path / "model", monkeypatch).startswith(shown)


def test_usage_code_runs_with_a_tokenizer(tmp_path, monkeypatch):
    kinds.tokenizer().save_pretrained(tmp_path / "model")
    kinds.model("llama").save_pretrained(tmp_path / "model")
    assert "AutoTokenizer" in (tmp_path / "model" / CARD).read_text(encoding="utf-8")
    assert "<unk>" not in run_usage(tmp_path / "model", monkeypatch)


@pytest.mark.parametrize("tokenizes", [False, True])
def test_usage_code_of_what_chooses_gives_it_choices(tokenizes, tmp_path, monkeypatch):
    if tokenizes:
        kinds.tokenizer().save_pretrained(tmp_path / "model")
    kinds.model("encoder", VariantForMultipleChoice).save_pretrained(tmp_path / "model")
    assert run_usage(tmp_path / "model", monkeypatch).strip() == "torch.Size([1, 2])"


def test_a_name_with_quotes_is_no_code(tmp_path):
    folder = tmp_path / 'my "best" \\ model'
    saved(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / CARD).read_text(encoding="utf-8"), flags=re.DOTALL)
    line = next(line for line in code.splitlines() if line.startswith("name = "))
    assert ast.literal_eval(line.removeprefix("name = ")) == folder.name


def test_saving_writes_card_and_drawing(tmp_path):
    model = saved(tmp_path, norm_placement="sandwich", num_key_value_heads=2)
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["hf-variants", "custom_code", "sandwich-norm", "rope"]
    assert MARKER in card.text.splitlines()
    assert "| block | `norm_placement` | sandwich |" in card.text
    assert f"| parameters | {model.num_parameters():,} |" in card.text
    assert f"({DRAWING})" in card.text
    paths = [group.get("data-path") for group in ElementTree.parse(tmp_path / DRAWING).iter(f"{SVG}g")]
    assert "self_attn_branch_norm" in paths
    # No path of this machine.
    assert str(tmp_path.parent) not in card.content


def test_only_the_main_process_writes(tmp_path):
    model = VariantForCausalLM(VariantConfig(**SIZES))
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / CARD).exists()
    assert not (tmp_path / DRAWING).exists()


def test_saving_needs_no_card_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(VariantPreTrainedModel, "cards", None)
    saved(tmp_path)
    assert not (tmp_path / CARD).exists()
    assert (tmp_path / "model.safetensors").is_file()


def test_saving_builds_no_other_model(tmp_path, monkeypatch):
    model = VariantForCausalLM(VariantConfig(**SIZES))

    def refuse(*args, **kwargs):
        raise AssertionError("another model was built")

    monkeypatch.setattr(VariantForCausalLM, "__init__", refuse)
    model.save_pretrained(tmp_path)
    assert f"| parameters | {model.num_parameters():,} |" in (tmp_path / CARD).read_text(encoding="utf-8")


def test_all_metadata(tmp_path):
    saved(tmp_path)
    given = {
        "license": "other",
        "license_name": "my-licence",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "base_model": "someone/else",
        "base_model_relation": "finetune",
        "datasets": ["wikitext"],
        "tags": ["mine"],
        "eval_results": [RESULT],
    }
    write_card(tmp_path, repo_id="someone/thing", **given)
    data = ModelCard.load(tmp_path / CARD).data
    for name in (
        "license",
        "license_name",
        "license_link",
        "language",
        "base_model",
        "base_model_relation",
        "datasets",
    ):
        assert data.get(name) == given[name]
    assert data.metrics == ["perplexity"]
    assert data.tags[-1] == "mine"
    assert data.eval_results == [RESULT]
    assert data.to_dict()["model-index"][0]["name"] == "thing"
    text = (tmp_path / CARD).read_text(encoding="utf-8")
    assert "| text-generation | WikiText (test) | perplexity | 12.5 |" in text
    assert 'name = "someone/thing"' in text


def test_what_was_given_is_kept_when_the_model_is_saved_again(tmp_path):
    model = saved(tmp_path)
    write_card(
        tmp_path, repo_id="someone/thing", license="mit", language="en", base_model="a/b", datasets=["c"], tags=["mine"],
        eval_results=[RESULT],
    )  # fmt: skip
    text = (tmp_path / CARD).read_text(encoding="utf-8")
    # A field that only the Hub knows.
    (tmp_path / CARD).write_text(
        text.replace("license: mit", "license: mit\nthumbnail: picture.png"), encoding="utf-8"
    )
    model.config.embedding_multiplier = 3.0
    model.save_pretrained(tmp_path)
    again = ModelCard.load(tmp_path / CARD)
    assert again.data.to_dict() == {**ModelCard(text).data.to_dict(), "thumbnail": "picture.png"}
    assert 'name = "someone/thing"' in again.text
    # The rest is new.
    assert "`embedding_multiplier` | 3.0" in again.text
    assert "`embedding_multiplier` | 3.0" not in text
    write_card(tmp_path, license="apache-2.0", tags=[])
    data = ModelCard.load(tmp_path / CARD).data
    assert data.license == "apache-2.0"
    assert "mine" not in data.tags
    assert data.base_model == "a/b"


def test_a_task_that_was_given_is_kept(tmp_path):
    model = MODELS["AutoModelForSeq2SeqLM"]()
    model.save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / CARD).data
    assert (data.pipeline_tag, data.tags[2]) == ("text-generation", "text2text-generation")
    assert hf_variants_cli.main(["card", str(tmp_path), "--pipeline-tag", "translation"]) == 0
    model.save_pretrained(tmp_path)
    again = ModelCard.load(tmp_path / CARD).data
    assert (again.pipeline_tag, again.tags) == ("translation", data.tags)


def test_results_add_their_metrics(tmp_path):
    saved(tmp_path)
    write_card(tmp_path, metrics="bleu")
    write_card(tmp_path, eval_results=[RESULT])
    assert ModelCard.load(tmp_path / CARD).data.metrics == ["bleu", "perplexity"]


def test_another_axis_replaces_its_tag(tmp_path):
    saved(tmp_path)
    saved(tmp_path, norm_placement="branch", position_embedding_type="alibi")
    assert ModelCard.load(tmp_path / CARD).data.tags == ["hf-variants", "custom_code", "branch-norm", "alibi"]


def test_a_new_licence_takes_the_name_of_the_old_one_away(tmp_path):
    saved(tmp_path)
    write_card(tmp_path, license="other", license_name="my-licence", license_link="LICENSE")
    write_card(tmp_path, license="mit")
    data = ModelCard.load(tmp_path / CARD).data.to_dict()
    assert data["license"] == "mit"
    assert "license_name" not in data
    assert "license_link" not in data


@pytest.mark.parametrize(
    "wrong", [{"license": "other"}, {"license": "mit", "license_name": "x"}, {"license_name": "x"}]
)
def test_half_a_licence_is_refused(tmp_path, wrong):
    saved(tmp_path)
    with pytest.raises(ValueError, match="license_name"):
        write_card(tmp_path, **wrong)


@pytest.mark.parametrize("edit", [lambda text: text.replace(f"{MARKER}\n", ""), lambda text: "# My model\n"])
def test_a_card_by_hand_is_left_alone(tmp_path, edit, capsys):
    model = saved(tmp_path)
    by_hand = edit((tmp_path / CARD).read_text(encoding="utf-8"))
    (tmp_path / CARD).write_text(by_hand, encoding="utf-8")
    (tmp_path / DRAWING).unlink()
    model.save_pretrained(tmp_path)
    write_card(tmp_path, repo_id="someone/thing")
    with pytest.raises(FileExistsError, match="`license`"):
        write_card(tmp_path, license="mit")
    assert hf_variants_cli.main(["card", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / CARD).read_text(encoding="utf-8") == by_hand
    assert not (tmp_path / DRAWING).exists()


def test_a_card_whose_metadata_was_broken_is_left_alone(tmp_path):
    model = saved(tmp_path)
    broken = (tmp_path / CARD).read_text(encoding="utf-8").replace("library_name:", "library_name: [")
    (tmp_path / CARD).write_text(broken, encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text(encoding="utf-8") == broken


def test_the_empty_form_of_transformers_is_replaced(tmp_path):
    """What transformers' own `push_to_hub` writes where the Hub has no card."""
    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    form = ModelCard.from_template(
        ModelCardData(tags=["sft"], library_name="transformers"), model_description=description
    )
    form.save(tmp_path / CARD)
    assert not is_by_hand(tmp_path / CARD)
    saved(tmp_path)
    card = ModelCard.load(tmp_path / CARD)
    assert MARKER in card.text
    assert card.data.tags[-1] == "sft"
    form.text = form.text.replace("[More Information Needed]", "a Transformer", 1)
    form.save(tmp_path / CARD)
    assert is_by_hand(tmp_path / CARD)


def test_lineage_follows_a_model_that_is_loaded_and_saved_elsewhere(tmp_path):
    saved(tmp_path / "first")
    write_card(tmp_path / "first", license="mit", base_model="a/b", datasets=["c"], eval_results=[RESULT], tags=["x"])
    VariantForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    data = ModelCard.load(tmp_path / "second" / CARD).data
    assert (data.license, data.base_model, data.datasets) == ("mit", "a/b", ["c"])
    # Those speak of the first model's weights.
    assert data.eval_results is None
    assert "x" not in data.tags


def test_a_model_from_the_hub_is_a_base_model(tmp_path, monkeypatch):
    model = VariantForCausalLM(VariantConfig(**SIZES))
    model.name_or_path = "someone/base"
    fetched = str(tmp_path / "config.json")
    monkeypatch.setattr("hf_variants.card.try_to_load_from_cache", lambda repo, file: fetched)
    model.save_pretrained(tmp_path / "a")
    assert ModelCard.load(tmp_path / "a" / CARD).data.base_model == "someone/base"
    assert model_card(tmp_path / "a", model, repo_id="someone/base").data.base_model is None
    monkeypatch.setattr("hf_variants.card.try_to_load_from_cache", lambda repo, file: None)
    assert lineage_of("runs/7") == {}
    assert lineage_of("a/path/of/a/folder/that/is/gone") == {}


def test_a_class_of_ones_own_is_shown_as_what_it_extends(tmp_path):
    class Mine(VariantForSequenceClassification):
        pass

    class Other(VariantPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.weight = torch.nn.Parameter(torch.zeros(3))

    Mine(VariantConfig(**SIZES, num_labels=3)).save_pretrained(tmp_path / "mine")
    assert ModelCard.load(tmp_path / "mine" / CARD).data.pipeline_tag == "text-classification"
    assert "32 → 3" in (tmp_path / "mine" / DRAWING).read_text(encoding="utf-8")
    Other(VariantConfig(**SIZES)).save_pretrained(tmp_path / "other")
    assert ModelCard.load(tmp_path / "other" / CARD).data.pipeline_tag == "feature-extraction"


def test_the_command_writes_metadata(tmp_path):
    VariantForMaskedLM(VariantConfig(**SIZES, is_causal=False)).save_pretrained(tmp_path)
    options = ["--license", "mit", "--language", "en", "--language", "de", "--dataset", "d", "--base-model", "a/b"]
    assert hf_variants_cli.main(["card", str(tmp_path), *options]) == 0
    data = ModelCard.load(tmp_path / CARD).data
    assert data.pipeline_tag == "fill-mask"
    assert (data.license, data.language, data.datasets, data.base_model) == ("mit", ["en", "de"], ["d"], "a/b")


def test_the_command_wants_a_variant(tmp_path, capsys):
    LlamaConfig().save_pretrained(tmp_path)
    assert hf_variants_cli.main(["card", str(tmp_path)]) == 2
    assert "llama" in capsys.readouterr().err


SIZED = {
    "tied": lambda: VariantForCausalLM(VariantConfig(**SIZES, tie_word_embeddings=True, type_vocab_size=2)),
    "untied": lambda: VariantForCausalLM(VariantConfig(**SIZES, position_embedding_type="learned")),
    "stored table": lambda: VariantForCausalLM(
        VariantConfig(**SIZES, position_embedding_type="sinusoidal", sinusoidal_table_stored=True)
    ),
    "seq2seq": lambda: VariantForConditionalGeneration(
        VariantSeq2SeqConfig(encoder=SIZES, decoder=SIZES, final_logits_bias=True)
    ),
}


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_sizes_are_those_of_the_model_and_its_files(name, shard, tmp_path):
    model = SIZED[name]().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    sizes = sizes_in(tmp_path, model)
    assert sizes.parameters == model.num_parameters()
    assert sizes.parameters - sizes.embeddings == model.num_parameters(exclude_embeddings=True)
    stored = [tensor for path in tmp_path.glob("*.safetensors") for tensor in load_file(path).values()]
    assert sizes.weights == {"bfloat16": sum(tensor.nbytes for tensor in stored)}
    # The same again from the folder alone.
    card = model_card(tmp_path).text
    assert f"| parameters | {model.num_parameters():,} |" in card
    assert f"| weights in bfloat16 | {readable(sizes.weights['bfloat16'])} |" in card


def test_sizes_without_files_are_the_models(tmp_path):
    model = SIZED["tied"]()
    assert sizes_in(tmp_path, model).parameters == model.num_parameters()


def test_quantised_weights_are_counted_as_what_they_stand_for(tmp_path):
    model = saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    packed = weights["lm_head.weight"].numel() // 2
    weights["lm_head.weight"] = torch.zeros(packed, dtype=torch.uint8)
    weights["lm_head.weight.absmax"] = torch.zeros(9)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    text = model_card(tmp_path).text
    assert f"| parameters | {model.num_parameters():,} |" in text
    assert f"| weights in uint8 | {readable(packed)} |" in text


CACHED = {
    "all": {},
    "window": {"layer_types": "SSF", "sliding_window": 8, "num_hidden_layers": 6, "num_key_value_heads": 2},
    "wide window": {"layer_types": "SF", "sliding_window": 500},
    "unequal": {"per_layer_config": {1: {"num_key_value_heads": 1}}},
}


@pytest.mark.parametrize("name", CACHED)
def test_cache_size_is_that_of_the_cache(name):
    config = VariantConfig(**{**SIZES, "max_position_embeddings": 64, **CACHED[name]})
    cache = StaticCache(config, max_cache_len=config.max_position_embeddings)
    VariantForCausalLM(config).to(torch.bfloat16)(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    allocated = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_sizes(config).at_context == allocated
    assert cache_sizes(config).context == 64


def test_cache_size_by_hand():
    config = VariantConfig(**SIZES, num_key_value_heads=2, per_layer_config={1: {"skip": ["self_attn"]}})
    # One layer, keys and values, 2 heads of 8 channels, 2 bytes.
    assert cache_sizes(config).per_token == 2 * 2 * 8 * 2
    config = VariantSeq2SeqConfig(encoder=SIZES, decoder={**SIZES, "num_key_value_heads": 1})
    assert cache_sizes(config).per_token == cache_sizes(config).per_source_token == 2 * 2 * 8 * 2
    assert cache_sizes(VariantConfig(**SIZES, is_causal=False)) is None


@pytest.mark.parametrize(("count", "text"), [(999, "999 bytes"), (1_500_000, "1.5 MB"), (2_000, "2.0 kB")])
def test_bytes_are_readable(count, text):
    assert readable(count) == text


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("natives") / "small-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=71, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    ModelCard("---\nlicense: apache-2.0\nlanguage: en\ntags: [old]\n---\n# Small\n").save(folder / CARD)
    return folder


@pytest.fixture(scope="module")
def converted(native, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "small-variant"
    convert(native, folder, verify=True)
    return folder


@pytest.fixture(scope="module")
def exported(converted, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "small-llama"
    export(converted, folder, verify=True)
    return folder


@pytest.fixture
def variant(converted, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(converted, tmp_path / "small-variant"))


def test_conversion_leaves_card_and_proof(native, converted):
    card = ModelCard.load(converted / CARD)
    assert (card.data.license, card.data.language) == ("apache-2.0", "en")
    assert "old" not in card.data.tags
    assert "Converted from `small-llama`, a `llama` checkpoint: 12 tensors" in card.text
    assert "bit-exact" in card.text
    assert "| 32 greedy tokens | yes | token by token, with the cache |" in card.text
    assert "| tensors of small-llama | yes |" in card.text
    assert "written again" not in card.text
    assert 'name = "small-variant"' in card.text
    record = read_record(converted)
    assert record["verification"]["ok"]
    assert (record["source"], record["destination"]) == ("small-llama", "small-variant")
    for file in (CARD, RECORD):
        assert str(native.parent) not in (converted / file).read_text(encoding="utf-8")
        assert str(converted.parent) not in (converted / file).read_text(encoding="utf-8")


def test_export_leaves_card_and_proof(converted, exported):
    text = (exported / CARD).read_text(encoding="utf-8")
    assert "| 32 greedy tokens | yes | token by token, with the cache |" in text
    assert "| tensors of small-variant | yes |" in text
    record = read_record(exported)
    assert record["verification"]["ok"]
    assert record["claims"]["weights"] == "verified"
    assert record["command"] == "hf-variants export small-variant small-llama --verify"
    for file in (CARD, RECORD):
        assert str(converted.parent) not in (exported / file).read_text(encoding="utf-8")


def test_conversion_without_verification_says_how_to_verify(native, tmp_path):
    report = convert(native, tmp_path / "variant")
    assert report.verification is None
    text = (tmp_path / "variant" / CARD).read_text(encoding="utf-8")
    assert "`hf-variants verify` compares the two" in text
    assert "| check |" not in text


def test_proof_speaks_of_the_weights_it_was_made_for(variant):
    write_card(variant, license="mit")
    assert "written again" not in (variant / CARD).read_text(encoding="utf-8")
    weights = load_file(variant / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, variant / "model.safetensors", metadata={"format": "pt"})
    assert not speaks_of(read_record(variant), variant)
    write_card(variant)
    text = (variant / CARD).read_text(encoding="utf-8")
    assert "have been written again since" in text
    assert "| 32 greedy tokens | yes |" in text


def test_a_model_saved_over_its_conversion_is_not_passed_off_as_it(variant):
    model = VariantForCausalLM.from_pretrained(variant)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(variant)
    assert "have been written again since" in (variant / CARD).read_text(encoding="utf-8")


def test_a_fine_tuned_copy_has_no_proof(variant, tmp_path):
    VariantForCausalLM.from_pretrained(variant).save_pretrained(tmp_path / "tuned")
    text = (tmp_path / "tuned" / CARD).read_text(encoding="utf-8")
    assert "The weights began as a `llama` checkpoint" in text
    assert "| check |" not in text


def test_a_damaged_record_does_not_stop_a_save(variant):
    (variant / RECORD).write_text("{", encoding="utf-8")
    VariantForCausalLM.from_pretrained(variant).save_pretrained(variant)
    assert "The weights began as" in (variant / CARD).read_text(encoding="utf-8")


def test_a_conversion_that_differs_is_not_written(native, tmp_path, monkeypatch, capsys):
    def differs(source, folder, **options):
        failed = verification.Check("outputs", False, "largest difference 2.0")
        return verification.VerificationReport(str(source), str(folder), [failed])

    monkeypatch.setattr(on_disk, "verify", differs)
    with pytest.raises(VerificationFailed, match=r"outputs: largest difference 2\.0"):
        convert(native, tmp_path / "variant", verify=True)
    assert not list(tmp_path.iterdir())
    assert hf_variants_cli.main(["convert", str(native), str(tmp_path / "variant"), "--verify"]) == 1
    captured = capsys.readouterr()
    assert "| outputs | NO |" in captured.out
    assert captured.err.startswith("error: ")


def test_an_export_that_differs_is_not_written(converted, tmp_path, monkeypatch, capsys):
    def differs(source, folder, **options):
        failed = verification.Check("outputs", False, "largest difference 2.0")
        return verification.VerificationReport(str(source), str(folder), [failed])

    monkeypatch.setattr(on_disk, "verify", differs)
    assert hf_variants_cli.main(["export", str(converted), str(tmp_path / "native"), "--verify"]) == 1
    assert "| outputs | NO |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_cast_is_not_verified_as_equal(native, converted, tmp_path):
    with pytest.raises(ConversionError, match="`dtype`"):
        convert(native, tmp_path / "variant", dtype="bfloat16", verify=True)
    with pytest.raises(ConversionError, match="`dtype`"):
        export(converted, tmp_path / "native", dtype="bfloat16", verify=True)
    assert not list(tmp_path.iterdir())
    convert(native, tmp_path / "variant", dtype="bfloat16")
    assert "cast from float32 to bfloat16" in (tmp_path / "variant" / CARD).read_text(encoding="utf-8")


def test_a_hub_id_is_the_base_model(native, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_variants.conversion.checkpoint.resolve_folder", lambda source: native)
    convert("someone/small-llama", tmp_path / "variant")
    card = ModelCard.load(tmp_path / "variant" / CARD)
    assert card.data.base_model == "someone/small-llama"
    assert card.data.license == "apache-2.0"
    assert "Converted from `someone/small-llama`" in card.text


def test_a_gguf_file_is_named_on_the_card(native, tmp_path):
    path = gguf_files.write(LlamaForCausalLM.from_pretrained(native), tmp_path / "small.gguf", "llama")
    convert(path, tmp_path / "variant")
    text = (tmp_path / "variant" / CARD).read_text(encoding="utf-8")
    assert "Converted from `small.gguf`, a `llama` checkpoint: 12 tensors" in text
    with pytest.raises(ConversionError, match="`dtype`"):
        convert(path, tmp_path / "other", dtype="float16", verify=True)


def test_export_leaves_a_card_and_a_record(variant, tmp_path):
    write_card(variant, base_model="someone/small-llama")
    export(variant, tmp_path / "native")
    card = ModelCard.load(tmp_path / "native" / CARD)
    assert card.data.base_model == "someone/small-llama"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["hf-variants"]
    assert card.data.license == "apache-2.0"
    assert "A `llama` checkpoint for `AutoModelForCausalLM`" in card.text
    assert AutoConfig.from_pretrained(tmp_path / "native").model_type == "llama"
    record = json.loads((tmp_path / "native" / RECORD).read_text(encoding="utf-8"))
    assert record["direction"] == "export"
    assert is_by_hand(tmp_path / "native" / CARD)


def test_export_tells_its_folds(tmp_path):
    model = saved(tmp_path / "variant", residual_multiplier=0.5)
    report = export(tmp_path / "variant", tmp_path / "native", model_type="llama")
    assert report.folds
    text = (tmp_path / "native" / CARD).read_text(encoding="utf-8")
    for fold in report.folds:
        assert f"- Folded into the weights: {fold}" in text
    assert model.config.residual_multiplier == 0.5


def test_the_page_of_presets_is_current(tmp_path):
    write_page(tmp_path)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    for path in sorted(made):
        published = ROOT / "model_cards" / path
        assert published.read_text(encoding="utf-8") == (tmp_path / path).read_text(encoding="utf-8"), (
            f"{path} is old. Run hf-variants presets --page model_cards."
        )
    drawings = {path.relative_to(ROOT / "model_cards") for path in (ROOT / "model_cards" / "drawings").iterdir()}
    assert drawings <= made

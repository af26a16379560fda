"""What decides the text travels: tokenizers of every mix of files, generation settings, sentence encoders, licences."""

import hashlib
import json
import random

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    BertTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizer,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
)
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
    tokenizer_class_from_name,
)

import hf_variants
import hf_variants_cli
from hf_variants.conversion import ConversionError, checkpoint, convert, export
from hf_variants.conversion.companions import copy_companions, copy_files
from hf_variants.conversion.family import all_families
from hf_variants.conversion.tokenization import differences, load_tokenizer
from tests.parity import hostile_


CORPUS = ["Hello World this is a test of user and assistant, the quick brown fox"] * 50
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "quick", "brown", "fox", "##s", "hello", *"abcdefgh"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_fallback_bpe():
    """In the manner of Llama 2, Mistral and Phi-3."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *BYTES])
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|user|>", normalized=False), AddedToken("<|end|>", normalized=False)])
    return tokenizer


def byte_level_bpe():
    """In the manner of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def vocabulary_alone(folder):
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")


def vocabulary_and_merges(folder):
    byte_level_bpe().model.save(str(folder))


def tokenizer_alone(folder):
    byte_fallback_bpe().save(str(folder / "tokenizer.json"))


def byte_level_alone(folder):
    byte_level_bpe().save(str(folder / "tokenizer.json"))


def named_llama(folder):
    tokenizer_alone(folder)
    write_json(
        folder / "tokenizer_config.json", {**NAMED, "tokenizer_class": "LlamaTokenizer", "padding_side": "left"}
    )


def named_llama_of_bytes(folder):
    byte_level_alone(folder)
    write_json(folder / "tokenizer_config.json", {**NAMED, "tokenizer_class": "LlamaTokenizerFast"})


def named_in_the_model_config(folder):
    byte_level_alone(folder)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def added_tokens(folder):
    vocabulary_and_merges(folder)
    write_json(folder / "added_tokens.json", {"<extra>": 400, "<more>": 401})
    write_json(folder / "special_tokens_map.json", {"pad_token": "<extra>", "additional_special_tokens": ["<more>"]})


MIXES = [
    vocabulary_alone, vocabulary_and_merges, tokenizer_alone, byte_level_alone, named_llama, named_llama_of_bytes,
    named_in_the_model_config, added_tokens,
]  # fmt: skip
# One native type for each way in which transformers lets the tokenizer depend on it.
REPRESENTATIVES = sorted(
    {
        (TOKENIZER_MAPPING_NAMES.get(name), name in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS): name
        for name in sorted(all_families())
    }.values()
)


def has_files_of_its_own(model_type):
    """Whether the type's tokenizer is one in Python, which wants files of its own names and formats."""
    name = TOKENIZER_MAPPING_NAMES.get(model_type)
    return name is not None and issubclass(tokenizer_class_from_name(name), PreTrainedTokenizer)


@pytest.mark.parametrize("mix", MIXES)
def test_a_tokenizer_is_the_same_whatever_names_it(mix, tmp_path):
    """For the `model_type` of each family, on which transformers lets the class of a tokenizer depend; there and back."""
    failures, read = [], 0
    for model_type in REPRESENTATIVES:
        folders = native, variant, back = [tmp_path / f"{model_type}-{name}" for name in ("native", "variant", "back")]
        for folder, kind in zip(folders, (model_type, hf_variants.VariantConfig.model_type, model_type), strict=True):
            folder.mkdir()
            write_json(folder / "config.json", {"model_type": kind})
        mix(native)
        expected = load_tokenizer(native)
        notes = copy_companions(native, variant) + copy_companions(variant, back, to_native=True)
        if isinstance(expected, str):
            assert notes
            continue
        read += 1
        for folder in (variant, back):
            made = load_tokenizer(folder)
            left = [made] if isinstance(made, str) else differences(expected, made)
            failures += [f"{model_type}, {folder.name}: {left}"] * bool(left)
        if mix is not named_in_the_model_config:
            files = {path.name: path.read_bytes() for path in native.iterdir() if path.name != "config.json"}
            failures += [
                f"{model_type}: other bytes in {name}"
                for name, content in files.items()
                if (back / name).read_bytes() != content
            ]
    assert not failures, "\n".join(failures)
    assert read > sum(not has_files_of_its_own(model_type) for model_type in REPRESENTATIVES) // 2


def test_what_the_config_decides_of_a_large_tokenizer_is_kept(tmp_path):
    """transformers cuts texts of Mistral's large vocabularies otherwise, by the `model_type` beside them."""
    native, variant = tmp_path / "native", tmp_path / "variant"
    for folder, kind in ((native, "mistral"), (variant, hf_variants.VariantConfig.model_type)):
        folder.mkdir()
        write_json(folder / "config.json", {"model_type": kind, "transformers_version": "4.50.0"})
    byte_level_alone(native)
    content = json.loads((native / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab |= {f"token{number}": number for number in range(len(vocab) + 1, 100_100)} | {"12": len(vocab)}
    # Digits stand alone there.
    content["model"]["merges"].append(["1", "2"])
    write_json(native / "tokenizer.json", content)
    write_json(
        native / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "fix_mistral_regex": True}
    )
    copy_companions(native, variant)
    before, after = (load_tokenizer(folder).tokenize("12") for folder in (native, variant))
    assert before == after == ["1", "2"]


def checkpoint_with(tokenizer, folder, model_class=MistralForCausalLM, config_class=MistralConfig):
    config = config_class(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    hostile_(model_class(config)).save_pretrained(folder)
    tokenizer(folder)
    return folder


def test_a_comparison_leaves_a_tokenizer_as_it_was_and_sees_its_truncation(tmp_path):
    """Where only what transformers saves is the same tokenizer, it is the one that was compared that is saved."""
    for name, limit in (("a", 40), ("b", 40), ("c", None)):
        (tmp_path / name).mkdir()
        made = byte_level_bpe()
        if limit is not None:
            made.enable_truncation(limit, stride=2)
            made.enable_padding(length=16, pad_id=1, pad_token="</s>")
        made.save(str(tmp_path / name / "tokenizer.json"))
        write_json(tmp_path / name / "tokenizer_config.json", {**NAMED, "tokenizer_class": "PreTrainedTokenizerFast"})
    a, b, c = (load_tokenizer(tmp_path / name) for name in "abc")
    before = a.backend_tokenizer.to_str()
    assert differences(a, b) == []
    assert a.backend_tokenizer.to_str() == b.backend_tokenizer.to_str() == before
    assert any("truncation" in found for found in differences(a, c))


def test_a_tokenizer_s_code_is_neither_run_nor_forgotten(tmp_path):
    folder = checkpoint_with(tokenizer_alone, tmp_path / "native")
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "own.py").write_text("raise SystemExit")
    report = convert(folder, tmp_path / "variant")
    assert "code of its own" in report.to_markdown()
    assert "code of its own" in (tmp_path / "variant" / "conversion_report.json").read_text()
    assert not isinstance(load_tokenizer(tmp_path / "variant"), str)


def test_links_are_followed_inside_the_folder_and_in_the_hub_s_cache_alone(tmp_path):
    folder = checkpoint_with(tokenizer_alone, tmp_path / "native")
    (tmp_path / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    (folder / "terms").write_text("terms")
    (folder / "NOTICE.txt").symlink_to("terms")
    convert(folder, tmp_path / "variant")
    assert not (tmp_path / "variant" / "LICENSE").exists()
    assert (tmp_path / "variant" / "NOTICE.txt").read_text() == "terms"
    cache = tmp_path / "models--owner--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in [path for path in folder.iterdir() if not path.is_symlink()]:
        (cache / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    convert(snapshot, tmp_path / "other")
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "license.md", "LICENCE.txt", "THIRD_PARTY_NOTICES.txt", "USE_POLICY.md", "Llama-3-LICENSE", "COPYING",
     "preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja", "added_tokens.json",
     "additional_chat_templates/tool_use.jinja", "source.spm", "target.spm", "tekken.json", "tokenizer.model.v3",
     "sentence_xlm-roberta_config.json"],
)  # fmt: skip
def test_what_travels(name, tmp_path):
    source, destination = tmp_path / "source", tmp_path / "destination"
    for folder in (source, destination):
        folder.mkdir()
    path = source / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    for stays in (
        "modeling_x.py",
        "license.py",
        "training_args.bin",
        "optimizer.pt",
        "trainer_state.json",
        "notes.md",
    ):
        (source / stays).write_text("{}")
    copy_files(source, destination)
    assert [str(p.relative_to(destination)) for p in destination.rglob("*") if p.is_file()] == [name]


# Generation settings


def random_settings(seed):
    """As configs written before transformers 4.25 have them."""
    rng = random.Random(seed)
    draws = {
        "num_beams": rng.choice([1, 2, 4]), "max_length": rng.randint(8, 20), "min_length": rng.randint(0, 6),
        "no_repeat_ngram_size": rng.choice([0, 2, 3]), "forced_bos_token_id": rng.randrange(60),
        "forced_eos_token_id": rng.randrange(60), "bad_words_ids": [[rng.randrange(5, 60)], [7, 8]],
        "length_penalty": rng.uniform(0.5, 2), "early_stopping": rng.random() < 0.5, "do_sample": rng.random() < 0.5,
        "temperature": rng.uniform(0.5, 2), "top_k": rng.randint(1, 50), "top_p": rng.random(),
        "repetition_penalty": rng.uniform(1, 2), "num_return_sequences": 1, "suppress_tokens": [3, 9],
        "task_specific_params": {"summarization": {"max_length": 3}}, "decoder_start_token_id": rng.randrange(60),
        "encoder_no_repeat_ngram_size": rng.choice([0, 4]), "remove_invalid_values": True,
    }  # fmt: skip
    return {name: draws[name] for name in rng.sample(sorted(draws), rng.randint(2, len(draws)))}


def plain(settings):
    """All that generation reads."""
    return {name: value for name, value in settings.to_dict().items() if name != "transformers_version"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["seq2seq", "decoder"])
def test_generation_settings_that_stand_in_the_config(kind, seed, tmp_path):
    sizes = {"vocab_size": 64, "max_position_embeddings": 64}
    if kind == "seq2seq":
        native, auto = BartForConditionalGeneration, AutoModelForSeq2SeqLM
        config = BartConfig(
            **sizes, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        )  # fmt: skip
    else:
        native, auto = LlamaForCausalLM, AutoModelForCausalLM
        config = LlamaConfig(
            **sizes, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
        )
    torch.manual_seed(seed)
    folders = source, variant, back = [tmp_path / name for name in ("native", "variant", "back")]
    hostile_(native(config), seed).save_pretrained(source)
    (source / "generation_config.json").unlink()
    write_json(source / "config.json", {**json.loads((source / "config.json").read_text()), **random_settings(seed)})
    convert(source, variant)
    export(variant, back)
    expected, *others = [auto.from_pretrained(folder).eval() for folder in folders]
    others += [hf_variants.from_native(source), hf_variants.from_native(expected)]
    others.append(hf_variants.to_native(others[-1]))
    assert plain(expected.generation_config) != plain(GenerationConfig())
    ids = torch.arange(3, 9)[None]
    torch.manual_seed(0)
    tokens = expected.generate(ids)
    for model in others:
        assert plain(model.generation_config) == plain(expected.generation_config)
        torch.manual_seed(0)
        assert torch.equal(model.generate(ids), tokens)


# Sentence encoders


def test_a_sentence_encoder_s_modules_leave_no_folder(tmp_path):
    source, destination = tmp_path / "source", tmp_path / "destination"
    for folder in (source, destination):
        folder.mkdir()
    write_json(source / "modules.json", [{"idx": 1, "name": "1", "path": "../x", "type": "sentence_transformers.P"}])
    with pytest.raises(ConversionError, match="leaves its folder"):
        copy_files(source, destination)


def test_weights_of_modules_travel_without_pickles(tmp_path):
    source, destination = tmp_path / "source", tmp_path / "destination"
    (source / "2_Dense").mkdir(parents=True)
    destination.mkdir()
    kind = "sentence_transformers.models.Dense"
    write_json(source / "modules.json", [{"idx": 2, "name": "2", "path": "2_Dense", "type": kind}])
    write_json(source / "2_Dense" / "config.json", {"in_features": 4, "out_features": 2})
    weights = {"linear.weight": torch.randn(2, 4)}
    torch.save(weights, source / "2_Dense" / "pytorch_model.bin")
    copy_files(source, destination)
    assert torch.equal(load_file(destination / "2_Dense" / "model.safetensors")["linear.weight"], *weights.values())
    assert sorted(path.name for path in (destination / "2_Dense").iterdir()) == ["config.json", "model.safetensors"]


def in_the_old_layout(folder):
    """Moves a sentence encoder's model into `0_Transformer`, where releases before 2.0 wrote it."""
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        if path.name not in ("modules.json", "config_sentence_transformers.json", "LICENSE"):
            path.rename(inner / path.name)
    first, *others = json.loads((folder / "modules.json").read_text())
    write_json(folder / "modules.json", [{**first, "path": "0_Transformer"}, *others])


def sentence_encoder(folder):
    """In parts, without Sentence Transformers."""
    checkpoint_with(tokenizer_alone, folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    write_json(folder / "modules.json", entries)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 12})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"query": "a "}})
    (folder / "LICENSE").write_text("terms")
    for path in list(kinds)[1:]:
        (folder / path).mkdir()
        write_json(folder / path / "config.json", {"pooling_mode_cls_token": True})
    save_file({"linear.weight": torch.ones(2, 4)}, folder / "2_Dense" / "model.safetensors")
    return entries


@pytest.mark.parametrize("given", ["whole", "its model"])
def test_a_sentence_encoder_whose_model_lies_in_a_folder_of_its_own(given, tmp_path):
    source = tmp_path / "source"
    entries = sentence_encoder(source)
    in_the_old_layout(source)
    convert(source if given == "whole" else source / "0_Transformer", tmp_path / "variant", verify=True)
    export(tmp_path / "variant", tmp_path / "back")
    for folder in (tmp_path / "variant", tmp_path / "back"):
        assert json.loads((folder / "modules.json").read_text()) == entries
        assert not (folder / "0_Transformer").exists()
        for name in (
            "1_Pooling/config.json",
            "2_Dense/model.safetensors",
            "config_sentence_transformers.json",
            "LICENSE",
        ):
            assert (folder / name).read_bytes() == (source / name).read_bytes()
        for name in ("sentence_bert_config.json", "tokenizer.json"):
            assert (folder / name).read_bytes() == (source / "0_Transformer" / name).read_bytes()


@pytest.mark.parametrize("whole", [T5ForConditionalGeneration, T5Model])
def test_of_an_encoder_decoder_as_a_sentence_encoder_the_encoder_is_taken(whole, tmp_path):
    """Sentence Transformers loads no more of T5, whatever lies in the folder."""
    source = tmp_path / "source"
    sentence_encoder(source)
    hostile_(whole(T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))).save_pretrained(
        source
    )
    report = convert(source, tmp_path / "variant")
    assert "of which T5EncoderModel is what was taken" in report.to_markdown()
    ids = torch.arange(3, 15)[None]
    made = AutoModel.from_pretrained(tmp_path / "variant")(ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(made.last_hidden_state, T5EncoderModel.from_pretrained(source)(ids).last_hidden_state)
    export(tmp_path / "variant", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["T5EncoderModel"]


@pytest.mark.parametrize("layout", ["new", "old"])
def test_every_module_s_weights_are_fetched(layout, tmp_path, monkeypatch):
    source, cache = tmp_path / "source", tmp_path / "models--owner--name" / "snapshots" / "0123"
    sentence_encoder(source)
    if layout == "old":
        in_the_old_layout(source)
    (source / "checkpoint-500").mkdir()
    for name in ("model.safetensors", "pytorch_model.bin"):
        (source / "checkpoint-500" / name).write_text("long")
    files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]

    def fetch(name, allow_patterns):
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            target, blob = cache / file, cache.parents[1] / "blobs" / file.replace("/", "-")
            for path in (target, blob):
                path.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes((source / file).read_bytes())
            target.unlink(missing_ok=True)
            target.symlink_to(blob)
        return str(cache)

    monkeypatch.setattr(checkpoint, "snapshot_download", fetch)
    convert("owner/name", tmp_path / "variant")
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors", "LICENSE"):
        assert (tmp_path / "variant" / name).read_bytes() == (source / name).read_bytes()
    assert not (cache / "checkpoint-500").exists()


@pytest.mark.whole
@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("pooling", ["cls", "max", "mean"])
def test_sentence_transformers_embeds_as_before(pooling, layout, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    config = BertConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    hostile_(BertModel(config)).save_pretrained(tmp_path / "bert")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(tmp_path / "bert")
    modules = [Transformer(str(tmp_path / "bert")), Pooling(32, pooling_mode=pooling), Dense(32, 8), Normalize()]
    SentenceTransformer(modules=modules, prompts={"query": "a b "}, device="cpu").save(str(tmp_path / "source"))
    if layout == "old":
        in_the_old_layout(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "variant")
    export(tmp_path / "variant", tmp_path / "back")
    expected, *others = [
        SentenceTransformer(str(tmp_path / name), device="cpu") for name in ("source", "variant", "back")
    ]
    for model in others:
        assert model.prompts == expected.prompts
        for options in ({}, {"prompt_name": "query"}):
            made, reference = (m.encode(["the quick fox", "hello a"], **options) for m in (model, expected))
            assert (made == reference).all()


# The record


def test_every_claim_of_a_conversion_is_recorded(tmp_path, capsys):
    folder = checkpoint_with(tokenizer_alone, tmp_path / "native")
    convert(folder, tmp_path / "plain")
    convert(folder, tmp_path / "proved", verify=True)
    plain, proved = (
        json.loads((tmp_path / name / "conversion_report.json").read_text()) for name in ("plain", "proved")
    )
    assert set(plain["claims"].values()) == {"not verified"}
    assert set(proved["claims"].values()) == {"verified"}
    assert proved["command"] == "hf-variants convert native proved --verify"
    weights = (folder / "model.safetensors").read_bytes()
    assert proved["source_sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert "| tokenizer | verified |" in (tmp_path / "proved" / "README.md").read_text()
    assert hf_variants_cli.main(["records", str(tmp_path / "proved"), str(tmp_path / "plain")]) == 0
    page = capsys.readouterr().out
    assert page.count("| training loss | verified |") == page.count("| training loss | not verified |") == 1


def test_what_a_checkpoint_lacks_is_not_applicable(tmp_path):
    folder = checkpoint_with(lambda folder: None, tmp_path / "native")
    convert(folder, tmp_path / "variant", verify=True)
    claims = json.loads((tmp_path / "variant" / "conversion_report.json").read_text())["claims"]
    assert claims.pop("tokenizer") == "not applicable"
    assert set(claims.values()) == {"verified"}


def test_what_cannot_be_generated_or_trained_in_stock_is_not_held_against_a_conversion(tmp_path):
    """A T5 whose config does not say what the decoder's inputs begin with, as its class's default."""
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    hostile_(T5ForConditionalGeneration(config)).save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant", verify=True)
    claims = json.loads((tmp_path / "variant" / "conversion_report.json").read_text())["claims"]
    assert claims["training loss"] == "not applicable"

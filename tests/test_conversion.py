"""The engine: folders in and out, what is refused, what travels along, and what a killed run leaves behind."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
)
from transformers.models.bart.modeling_bart import BartDecoderWrapper

import hf_variants
from hf_variants.conversion import (
    ConversionError,
    NotRepresentable,
    UnsupportedModelType,
    convert,
    export,
    on_disk,
    rules,
    verify,
)
from hf_variants.conversion.family import all_families
from hf_variants.conversion.skeleton import empty_model, stored_tensors
from tests.native_rows import all_rows
from tests.parity import hostile_, random_native


SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def llama(model_class=LlamaForCausalLM, **fields):
    return hostile_(model_class(LlamaConfig(**{**SIZES, **fields}))).eval()


def saved(model, folder, **arguments):
    model.save_pretrained(folder, **arguments)
    return folder


def rewrite_config(folder, remove=(), **changes):
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps({**config, **changes}))


def rewrite_tensors(folder, function):
    tensors = load_file(folder / "model.safetensors")
    function(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits(model, length=40):
    ids = torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


# Folders


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", ["20KB", "5GB"])
def test_there_and_back_on_disk(tmp_path, tied, dtype, shards):
    native = llama(tie_word_embeddings=tied).to(dtype)
    saved(native, tmp_path / "native", max_shard_size=shards)
    # Once more from the folder, because a model that is cast in memory has cast frequencies, too.
    native = LlamaForCausalLM.from_pretrained(tmp_path / "native", dtype="auto")
    small = 20_000 if shards == "20KB" else 5_000_000_000
    report = convert(tmp_path / "native", tmp_path / "variant", max_shard_bytes=small)
    assert report.exactness == "bit-exact"
    for name in ("native", "variant"):
        assert (len(list((tmp_path / name).glob("*.safetensors"))) > 1) == (shards == "20KB")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "variant", dtype="auto")
    assert type(ours) is hf_variants.VariantForCausalLM
    assert ours.dtype is dtype
    assert torch.equal(logits(ours), logits(native))
    export(tmp_path / "variant", tmp_path / "back", max_shard_bytes=small)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert type(back) is LlamaForCausalLM
    assert equal_states(back, native)
    assert equal_states(hf_variants.from_native(tmp_path / "native"), ours)


def test_a_stored_copy_of_a_tied_head_is_dropped_if_it_is_one_and_else_untied(tmp_path):
    native = llama(tie_word_embeddings=True)
    saved(native, tmp_path / "native")
    copy_head = lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]})  # noqa: E731
    rewrite_tensors(tmp_path / "native", copy_head)
    convert(tmp_path / "native", tmp_path / "variant")
    assert "lm_head.weight" not in load_file(tmp_path / "variant" / "model.safetensors")
    rewrite_tensors(tmp_path / "native", lambda tensors: tensors["lm_head.weight"].mul_(1.5))
    report = convert(tmp_path / "native", tmp_path / "other")
    assert "lm_head.weight" in report.notes[0]
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "native")
    for ours in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "other"),
        hf_variants.from_native(tmp_path / "native"),
    ):
        assert not ours.config.tie_word_embeddings
        assert torch.equal(logits(ours.eval()), logits(stock))


def test_names_without_the_prefix_of_the_head(tmp_path):
    native = hostile_(
        GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    ).eval()
    saved(native.transformer, tmp_path / "native")
    rewrite_config(tmp_path / "native", architectures=["GPT2LMHeadModel"])
    # GPT-2's own checkpoint stores its masks, too.
    mask = torch.ones(1, 1, 64, 64).tril().bool()
    rewrite_tensors(
        tmp_path / "native", lambda tensors: tensors.update({"h.0.attn.bias": mask, "h.1.attn.bias": mask})
    )
    convert(tmp_path / "native", tmp_path / "variant")
    assert verify(tmp_path / "native", tmp_path / "variant", new_tokens=4, progress=False).ok


def test_a_config_without_architectures_is_a_language_model(tmp_path):
    saved(llama(), tmp_path / "native")
    rewrite_config(tmp_path / "native", remove=["architectures"])
    assert convert(tmp_path / "native", tmp_path / "variant").head == "causal_lm"


def test_casting(tmp_path):
    native = llama()
    saved(native, tmp_path / "native")
    report = convert(tmp_path / "native", tmp_path / "variant", dtype="bfloat16")
    assert report.exactness == "cast from float32 to bfloat16"
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "variant", dtype="auto")
    assert ours.dtype is torch.bfloat16
    assert torch.equal(ours.lm_head.weight, native.lm_head.weight.bfloat16())
    assert (
        export(tmp_path / "variant", tmp_path / "back", dtype="float32").exactness == "cast from bfloat16 to float32"
    )
    assert convert(tmp_path / "native", tmp_path / "same", dtype="float32").exactness == "bit-exact"
    with pytest.raises(ConversionError, match="int8"):
        convert(tmp_path / "native", tmp_path / "int8", dtype="int8")


def test_nan_weights_are_reported(tmp_path):
    native = llama()
    with torch.no_grad():
        native.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    saved(native, tmp_path / "native")
    report = convert(tmp_path / "native", tmp_path / "variant")
    assert report.non_finite == ["model.layers.1.mlp.up_proj.weight"]
    assert "model.layers.1.mlp.up_proj.weight" in report.to_markdown()


def test_values_beyond_half_precision_are_reported(tmp_path):
    native = llama()
    with torch.no_grad():
        native.lm_head.weight[0, 0] = 1e6
    saved(native, tmp_path / "native")
    assert convert(tmp_path / "native", tmp_path / "variant", dtype="float16").non_finite == ["lm_head.weight"]


# What is refused


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(48, 32)}), "model.layers.3"),
        (lambda t: t.update({"model.norm.weight": torch.ones(16)}), "model.norm.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, named):
    saved(llama(), tmp_path / "native")
    rewrite_tensors(tmp_path / "native", change)
    with pytest.raises(ConversionError, match=named.replace(".", r"\.")):
        convert(tmp_path / "native", tmp_path / "variant")
    assert sorted(os.listdir(tmp_path)) == ["native"]
    with pytest.raises(ConversionError):
        hf_variants.from_native(tmp_path / "native")


def sharded(tmp_path):
    folder = saved(llama(), tmp_path / "native", max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder, index


def test_tables_that_a_checkpoint_lacks_are_computed(tmp_path):
    """Marian leaves its sinusoids out when it saves, and the bias of the logits may be absent."""
    native = random_native(all_rows()["marian"], 0)
    for stack in (native.model.encoder, native.model.decoder):
        stack.embed_positions.weight.data = stack.embed_positions.create_weight()
    native.final_logits_bias.zero_()
    native.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "model.encoder.embed_positions.weight" not in tensors
    del tensors["final_logits_bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, from_memory = hf_variants.from_native(tmp_path), hf_variants.from_native(native)
    for name, tensor in from_memory.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def write_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "path",
    [
        "../secret.safetensors", "/etc/secret.safetensors", "a/../../b.safetensors", "..\\b.safetensors", "C:b.safetensors",
        "config.json", 7,
    ],
)  # fmt: skip
def test_an_index_cannot_leave_the_folder(tmp_path, path):
    folder, index = sharded(tmp_path)
    index["weight_map"][next(iter(index["weight_map"]))] = path
    write_index(folder, index)
    for function in (hf_variants.from_native, lambda f: convert(f, tmp_path / "out"), lambda f: verify(f, f)):
        with pytest.raises(ConversionError, match="Do not trust"):
            function(folder)


def beside_others(weight_map):
    """A tensor whose file is still named for others where the index forgets it."""
    files = list(weight_map.values())
    return next(name for name, file in weight_map.items() if files.count(file) > 1)


def lacks_a_name(weight_map, folder):
    del weight_map[beside_others(weight_map)]


def names_what_no_file_has(weight_map, folder):
    weight_map["model.layers.0.self_attn.rotary_emb.inv_freq"] = weight_map[min(weight_map)]


def names_another_file(weight_map, folder):
    name = beside_others(weight_map)
    weight_map[name] = next(file for file in weight_map.values() if file != weight_map[name])


def in_two_files(weight_map, folder, change=0.0):
    name = min(weight_map)
    other = next(file for file in weight_map.values() if file != weight_map[name])
    tensor = load_file(folder / weight_map[name])[name]
    save_file({**load_file(folder / other), name: tensor + change}, folder / other, metadata={"format": "pt"})


@pytest.mark.parametrize("mistake", [lacks_a_name, names_what_no_file_has, names_another_file, in_two_files])
def test_the_files_of_an_index_are_read_whatever_it_says_of_their_tensors(mistake, tmp_path):
    """As transformers reads them."""
    folder, index = sharded(tmp_path)
    mistake(index["weight_map"], folder)
    write_index(folder, index)
    report = convert(folder, tmp_path / "variant")
    assert any("says otherwise" in note for note in report.notes) == (mistake is not in_two_files)
    assert verify(folder, tmp_path / "variant", progress=False).ok


def test_two_files_of_an_index_with_other_values_for_one_tensor(tmp_path):
    folder, index = sharded(tmp_path)
    in_two_files(index["weight_map"], folder, change=1.0)
    with pytest.raises(ConversionError, match="different values"):
        convert(folder, tmp_path / "out")


def test_a_missing_shard(tmp_path):
    folder, index = sharded(tmp_path)
    (folder / next(iter(index["weight_map"].values()))).unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        convert(folder, tmp_path / "out")


def test_a_link_to_a_shard_elsewhere_is_followed_like_the_hub_cache(tmp_path):
    folder = saved(llama(), tmp_path / "native")
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    convert(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_file_that_is_no_safetensors(tmp_path, content):
    folder = saved(llama(), tmp_path / "native")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ConversionError, match=r"model\.safetensors"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {"load_in_4bit": True}]
)
def test_a_quantised_checkpoint_is_refused(tmp_path, quantization):
    folder = saved(llama(), tmp_path / "native")
    rewrite_config(folder, quantization_config=quantization)
    with pytest.raises(ConversionError, match="quantised"):
        convert(folder, tmp_path / "out")


def test_a_class_without_counterpart_is_named(tmp_path):
    config = BartConfig(
        vocab_size=32, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
    )  # fmt: skip
    # Neither a whole model nor one stack with a head.
    BartDecoderWrapper(config).save_pretrained(tmp_path / "native")
    with pytest.raises(UnsupportedModelType, match=r"BartDecoderWrapper .* stock class"):
        convert(tmp_path / "native", tmp_path / "out")


@pytest.mark.parametrize("architectures", [None, ["LlamaForSomethingElse"], ["Llama_XYZ"]])
@pytest.mark.parametrize(("keep", "head"), [(True, "VariantForCausalLM"), (False, "VariantModel")])
def test_where_no_known_class_is_named_the_tensors_say_which_it_is(tmp_path, architectures, keep, head):
    folder = saved(llama(), tmp_path / "native")
    rewrite_config(folder, architectures=architectures)
    tensors = load_file(folder / "model.safetensors")
    if not keep:
        del tensors["lm_head.weight"]
    own = {"something.weight": torch.ones(2)} if architectures else {}
    save_file(tensors | own, folder / "model.safetensors", metadata={"format": "pt"})
    report = convert(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [head]
    assert report.passed_over.keys() == own.keys()
    assert bool(report.part) == bool(architectures)
    assert verify(folder, tmp_path / "out").ok


@pytest.mark.parametrize("source", ["no/such/folder", "nothing_here"])
def test_a_source_that_is_not_there(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        convert(source, tmp_path / "out")


def test_a_gguf_file_that_is_not_there(tmp_path):
    for function in (hf_variants.from_native, lambda path: convert(path, tmp_path / "out"), lambda p: verify(p, p)):
        with pytest.raises(FileNotFoundError, match="GGUF"):
            function(tmp_path / "model.gguf")


def test_a_native_checkpoint_is_not_exported(tmp_path):
    with pytest.raises(ConversionError, match="not a variant"):
        export(saved(llama(), tmp_path / "native"), tmp_path / "out")


# The destination


def test_a_destination_with_something_in_it_is_left_alone(tmp_path):
    folder = saved(llama(), tmp_path / "native")
    for name in ("full", "file"):
        target = tmp_path / name
        if name == "full":
            target.mkdir()
            (target / "mine.txt").write_text("precious")
        else:
            target.write_text("precious")
        with pytest.raises(FileExistsError, match=name):
            convert(folder, target)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    convert(folder, tmp_path / "empty")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_run_that_dies_leaves_nothing(tmp_path, monkeypatch, error):
    folder = saved(llama(), tmp_path / "native")

    def die(*args, **kwargs):
        raise error

    monkeypatch.setattr(on_disk, "copy_companions", die)
    with pytest.raises(type(error)):
        convert(folder, tmp_path / "out")
    assert os.listdir(tmp_path) == ["native"]


# What travels along


def with_tokenizer(folder, **settings):
    words = {word: index for index, word in enumerate(["[PAD]", "<s>", "</s>", "[UNK]", "the", "quick", "fox"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_tokenizer_template_and_generation_settings_travel_and_code_does_not(tmp_path):
    native = llama()
    native.generation_config = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=[2, 4], pad_token_id=0)
    folder = saved(native, tmp_path / "native")
    with_tokenizer(folder, auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    rewrite_config(folder, auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "LICENSE").write_text("yours")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    for source, name, step in ((folder, "variant", convert), (tmp_path / "variant", "back", export)):
        step(source, tmp_path / name)
        files = {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file()}
        assert {"tokenizer.json", "LICENSE", "additional_chat_templates/rag.jinja"} <= files
        assert not {"evil.py", "training_args.bin"} & files
        assert "auto_map" not in (tmp_path / name / "tokenizer_config.json").read_text()
        assert "evil" not in (tmp_path / name / "config.json").read_text()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.7, [2, 4])
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer("the quick fox").input_ids == [4, 5, 6]
        assert tokenizer.apply_chat_template([{"role": "user", "content": "fox"}], tokenize=False) == "fox"
    report = verify(folder, tmp_path / "back", new_tokens=4, progress=False)
    assert report.ok
    assert "tokenizer" in [check.name for check in report.checks]


def test_another_tokenizer_fails_verification(tmp_path):
    folder = saved(llama(), tmp_path / "native")
    with_tokenizer(folder)
    convert(folder, tmp_path / "variant")
    path = tmp_path / "variant" / "chat_template.jinja"
    path.write_text(path.read_text() + "!")
    report = verify(folder, tmp_path / "variant", new_tokens=0, progress=False)
    assert [check.name for check in report.checks if not check.ok] == ["tokenizer"]


def test_an_embedding_with_more_rows_than_the_tokenizer(tmp_path):
    native = llama()
    folder = saved(native, tmp_path / "native")
    with_tokenizer(folder)
    convert(folder, tmp_path / "variant")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "variant")) < native.config.vocab_size
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "variant")
    assert torch.equal(ours.get_input_embeddings().weight, native.get_input_embeddings().weight)


def test_generation_settings_travel_in_memory():
    native = llama()
    native.generation_config.temperature = 0.3
    ours = hf_variants.from_native(native)
    assert ours.generation_config.temperature == hf_variants.to_native(ours).generation_config.temperature == 0.3


# Configs as they were written years ago


def test_legacy_keys_of_a_hand_written_config(tmp_path):
    scaling = {
        "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    rope = {**scaling, "rope_type": "llama3", "rope_theta": 500.0}
    del rope["type"]
    folder = saved(llama(rope_parameters=rope).bfloat16(), tmp_path / "native")
    native = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    rewrite_config(
        folder, remove=["rope_parameters", "dtype", "head_dim", "transformers_version"], rope_scaling=scaling,
        rope_theta=500.0, torch_dtype="bfloat16", _name_or_path="somewhere",
    )  # fmt: skip
    ours = hf_variants.from_native(folder)
    assert ours.config.rope_parameters["rope_theta"] == 500.0
    assert ours.config.rope_parameters["rope_type"] == "llama3"
    assert ours.dtype is torch.bfloat16
    assert torch.equal(logits(ours), logits(native))
    convert(folder, tmp_path / "variant")
    assert verify(folder, tmp_path / "variant", new_tokens=4, progress=False).ok


def test_keys_of_real_checkpoints_that_mean_nothing(tmp_path):
    folder = saved(llama(), tmp_path / "native")
    rewrite_config(
        folder, **{"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}
    )
    ours = hf_variants.from_native(folder)
    assert json.loads(hf_variants.to_native(ours).config.to_json_string())["is_llama_config"] is True


# Heads


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    ("native_class", "ours_class"),
    [
        (LlamaModel, "VariantModel"),
        (LlamaForSequenceClassification, "VariantForSequenceClassification"),
    ],
)
def test_other_heads_go_both_ways(tmp_path, native_class, ours_class, on_disk):
    native = llama(native_class, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    if on_disk:
        saved(native, tmp_path / "native")
        convert(tmp_path / "native", tmp_path / "variant")
        export(tmp_path / "variant", tmp_path / "back")
        ours = getattr(hf_variants, ours_class).from_pretrained(tmp_path / "variant")
        back = native_class.from_pretrained(tmp_path / "back")
        assert verify(tmp_path / "native", tmp_path / "variant", progress=False).ok
    else:
        ours = hf_variants.from_native(native)
        back = hf_variants.to_native(ours)
        assert verify(native, ours, progress=False).ok
    assert type(ours).__name__ == ours_class
    assert equal_states(back, native)
    assert back.config.id2label == {0: "a", 1: "b", 2: "c"}
    ids = torch.randint(1, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(native(ids)[0], ours(ids)[0])


@pytest.mark.parametrize("model_type", all_rows())
def test_every_head_that_is_listed_has_rules_both_ways(model_type):
    """By names alone; `test_native_parity` compares outputs."""
    family, config = all_families()[model_type], random_native(all_rows()[model_type], 1).config
    config._attn_implementation = "eager"
    for head in family.converted_heads:
        native = empty_model(family.native_class(head), config)
        ours = empty_model(family.variant_class(head), family.config_map.to_variant(config, (), head))
        theirs, own = stored_tensors(native), stored_tensors(ours)
        assert len(theirs) > 2
        steps = rules.plan(family.rules_for(head), theirs, own)
        assert {name for step in steps for name in step.targets} == set(own)
        steps = rules.plan(family.rules_for(head), own, theirs, to_native=True)
        assert {name for step in steps for name in step.targets} == set(theirs)


def test_a_classifier_without_a_padding_token_verifies():
    native = llama(LlamaForSequenceClassification, num_labels=3, pad_token_id=None)
    assert verify(native, hf_variants.from_native(native), progress=False).ok


# The way back


def test_what_no_native_type_has_is_named_in_full():
    config = hf_variants.VariantConfig(**SIZES, norm_placement="deepnorm", attention_gate="headwise")
    model = hf_variants.VariantForCausalLM(config)
    with pytest.raises(NotRepresentable) as caught:
        hf_variants.to_native(model, "llama")
    assert {"norm_placement", "attention_gate", "final_norm"} <= set(caught.value.fields)
    assert all(f"`{name}`" in str(caught.value) for name in caught.value.fields)
    with pytest.raises(NotRepresentable, match="comes nearest") as nearest:
        hf_variants.to_native(model)
    assert nearest.value.model_type in all_families()


@pytest.mark.parametrize(
    ("fields", "fitting"),
    [
        ({}, "llama"),
        ({"qk_norm": "head"}, "qwen3"),
        (
            {"norm_placement": "branch", "qk_norm": "full", "norm_casting_mode": "gemma", "rope_in_float32": True,
             "rope_table_in_float32": True},
            "olmo2",
        ),
    ],
)  # fmt: skip
def test_a_fitting_type_is_found(fields, fitting):
    model = hostile_(hf_variants.VariantForCausalLM(hf_variants.VariantConfig(**{**SIZES, **fields}))).eval()
    native = hf_variants.to_native(model)
    assert native.config.model_type == fitting
    assert torch.equal(logits(native), logits(model))


def test_the_origin_is_preferred():
    ours = hf_variants.from_native(llama())
    assert type(hf_variants.to_native(ours)) is LlamaForCausalLM
    assert type(hf_variants.to_native(ours, "mistral")).__name__ == "MistralForCausalLM"


def test_training_settings_that_are_lost_are_listed(tmp_path):
    config = hf_variants.VariantConfig(**SIZES, z_loss_coefficient=1e-4)
    saved(hf_variants.VariantForCausalLM(config), tmp_path / "variant")
    report = export(tmp_path / "variant", tmp_path / "native")
    assert report.dropped == {"z_loss_coefficient": 1e-4}
    assert "z_loss_coefficient" in report.to_markdown()


WITH_WINDOWS = [
    name
    for name in all_rows()
    if all_families()[name].primary == "causal_lm"
    and "sliding_window" in all_families()[name].config_map.native_class().to_dict()
]


@pytest.mark.parametrize("model_type", WITH_WINDOWS)
def test_an_export_without_sliding_layers_runs(model_type):
    """Some classes build a mask for sliding layers whether or not there are any."""
    native = random_native(all_rows()[model_type], 0)
    changes = {"layer_types": "F", "sliding_window": None, "native_leftovers": None}
    config = hf_variants.VariantConfig.from_dict({**hf_variants.from_native(native).config.to_dict(), **changes})
    model = hostile_(hf_variants.VariantForCausalLM(config)).eval()
    try:
        exported = hf_variants.to_native(model, model_type)
    except NotRepresentable:
        pytest.skip("the type has windows always")
    for either in (exported, model):
        either.set_attn_implementation("eager")
    assert torch.equal(logits(exported, 20), logits(model, 20))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_the_attention_that_a_config_asks_for(tmp_path, key):
    folder = saved(llama(), tmp_path / "native")
    rewrite_config(folder, **{key: "eager"})
    convert(folder, tmp_path / "out")
    stock = LlamaForCausalLM.from_pretrained(folder)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.config._attn_implementation == ours.config._attn_implementation == "eager"
    # One that is not installed here is no obstacle to converting.
    rewrite_config(folder, **{key: "flash_attention_2"})
    convert(folder, tmp_path / "elsewhere")
    assert (
        json.loads((tmp_path / "elsewhere" / "config.json").read_text())["attn_implementation"] == "flash_attention_2"
    )


def test_a_table_that_no_checkpoint_has_is_not_rounded_to_its_dtype(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = MarianConfig(
        vocab_size=32, pad_token_id=31, encoder_attention_heads=2, decoder_attention_heads=2, **sizes
    )
    folder = saved(hostile_(MarianMTModel(config)).to(torch.float16), tmp_path / "native")
    convert(folder, tmp_path / "out")
    ids = torch.arange(12)[None]
    for dtype in (torch.float32, torch.float16):
        stock = MarianMTModel.from_pretrained(folder, dtype=dtype)
        from_disk = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", dtype=dtype)
        for ours in (from_disk, hf_variants.from_native(folder, dtype=dtype)):
            assert {tensor.dtype for tensor in ours.parameters()} == {dtype}
            with torch.no_grad():
                expected, seen = (model(ids, decoder_input_ids=ids).logits for model in (stock, ours))
            assert torch.equal(seen, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 24},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.5},
    ],
)
def test_rope_keys_mean_what_they_mean_to_the_stock_class(tmp_path, changes):
    folder = saved(llama(), tmp_path / "native")
    rewrite_config(folder, remove=("rope_parameters",), **changes)
    convert(folder, tmp_path / "out")
    assert verify(folder, tmp_path / "out").ok
    export(tmp_path / "out", tmp_path / "back")
    before, after = (LlamaConfig.from_pretrained(path) for path in (folder, tmp_path / "back"))
    assert before.rope_parameters == after.rope_parameters

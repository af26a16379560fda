"""Vocabularies: kept pieces are cut and computed as before, for every kind of tokenizer."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForConditionalGeneration,
    VariantForMaskedLM,
    VariantSeq2SeqConfig,
)
from hf_variants.surgery import (
    ExtendVocabulary,
    KeepTokens,
    PadVocabulary,
    SurgeryError,
    TrimVocabulary,
    edit,
    edit_model,
)
from hf_variants_cli import main
from tests.parity import hostile_


TEXT = (
    "The quick brown fox jumps over the lazy dog. " * 3
    + "Don't panic, the dogs are barking quickly; foxes jumped overboard!"
)
OTHER = "Vingt mille lieues sous les mers: naïve café, Привет мир, 12345 67890 and many more words in here."
KEPT = "the quick dogs jumped over the fox. The barking panic"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


def trained(kind: str) -> PreTrainedTokenizerFast:
    common = {"vocab_size": 400, "special_tokens": SPECIAL}
    corpus = [TEXT, OTHER] * 5
    post = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    if kind == "byte bpe":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(**common, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    elif kind == "byte-fallback bpe":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(**common | {"special_tokens": SPECIAL + [f"<0x{i:02X}>" for i in range(256)]})
        trainer.vocab_size = 500
    elif kind == "bpe with a suffix":
        made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
        trainer = trainers.BpeTrainer(**common, end_of_word_suffix="</w>")
    elif kind == "bpe with a prefix":
        made = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        trainer = trainers.BpeTrainer(**common, continuing_subword_prefix="##")
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(**common | {"vocab_size": 150}, unk_token="<unk>")
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**common)
        post = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    else:
        made = Tokenizer(models.WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(**common)
    made.train_from_iterator(corpus, trainer)
    made.post_processor = post
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    tokenizer.add_tokens(["<|call|>"], special_tokens=False)
    tokenizer.chat_template = "{% for m in messages %}<|call|>{{ m.content }}</s>{% endfor %}"
    return tokenizer


def with_rows(model: LlamaForCausalLM, rows: list[int]) -> LlamaForCausalLM:
    """The stock model with these tokens alone, assembled by hand."""
    config = LlamaConfig.from_dict({**model.config.to_dict(), "vocab_size": len(rows)})
    smaller = LlamaForCausalLM(config).eval()
    kept = {name: tensor[rows] if len(tensor) == model.config.vocab_size else tensor
            for name, tensor in model.state_dict().items()}  # fmt: skip
    smaller.load_state_dict(kept)
    return smaller


KINDS = ("byte bpe", "byte-fallback bpe", "bpe with a suffix", "bpe with a prefix", "unigram", "wordpiece", "words")


@pytest.mark.parametrize("kind", KINDS)
def test_a_trimmed_vocabulary_cuts_and_computes_as_before(kind, tmp_path):
    tokenizer = trained(kind)
    size = len(tokenizer) + 3
    model = hostile_(LlamaForCausalLM(LlamaConfig(**SIZES, **IDS, vocab_size=size, tie_word_embeddings=True))).eval()
    model.generation_config = GenerationConfig(
        **IDS,
        suppress_tokens=[size - 1, tokenizer.convert_tokens_to_ids("<|call|>")],
        bad_words_ids=[[2, 1], [5, size - 1]],
    )
    model.save_pretrained(tmp_path / "native")
    tokenizer.save_pretrained(tmp_path / "native")
    report = edit(tmp_path / "native", tmp_path / "ours", [TrimVocabulary(TEXT)], native=tmp_path / "back")
    assert report.difference.same_bits
    assert report.tokenizer == []
    for folder in ("ours", "back"):
        made = AutoTokenizer.from_pretrained(tmp_path / folder)
        smaller = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert smaller.config.vocab_size == len(made) < size - 20
        columns = [tokenizer.convert_tokens_to_ids(token) for token in made.convert_ids_to_tokens(range(len(made)))]
        by_hand = with_rows(model, columns)
        for text in (
            TEXT,
            KEPT,
            f"{KEPT}<|call|>",
            tokenizer.apply_chat_template([{"content": KEPT}], tokenize=False),
        ):
            before, after = tokenizer(text).input_ids, made(text).input_ids
            if text is TEXT or set(tokenizer.convert_ids_to_tokens(before)) <= set(made.get_vocab()):
                assert tokenizer.convert_ids_to_tokens(before) == made.convert_ids_to_tokens(after)
                with torch.no_grad():
                    logits = smaller(torch.tensor([after])).logits
                    assert torch.equal(logits, by_hand(torch.tensor([after])).logits)
                    # Of one to three rows, some CPUs sum a product in an order that depends on its columns.
                    if len(before) > 3:
                        assert torch.equal(logits, model(torch.tensor([before])).logits[..., columns])
        assert made.special_tokens_map == tokenizer.special_tokens_map
        assert made.chat_template == tokenizer.chat_template
        call = made.convert_tokens_to_ids("<|call|>")
        assert made.added_tokens_decoder[call].content == "<|call|>"
        assert smaller.generation_config.suppress_tokens == [call]
        assert smaller.generation_config.bad_words_ids == [[2, 1]]
        assert smaller.config.eos_token_id == made.eos_token_id


def test_special_ids_move_with_their_tokens(tmp_path):
    tokenizer = trained("byte bpe")
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    config = VariantConfig(**SIZES, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=[end, 2], pad_token_id=end)
    model = hostile_(VariantForCausalLM(config))
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    (tmp_path / "words.txt").write_text("Ġthe\n")
    assert (
        main(["edit", str(tmp_path / "ours"), str(tmp_path / "small"), "--keep-tokens", str(tmp_path / "words.txt")])
        == 0
    )
    made = AutoTokenizer.from_pretrained(tmp_path / "small")
    smaller = VariantForCausalLM.from_pretrained(tmp_path / "small")
    assert smaller.config.eos_token_id == [made.convert_tokens_to_ids("<|end|>"), 2]
    assert smaller.config.pad_token_id == smaller.generation_config.pad_token_id == len(made) - 1
    # Bytes stay, so that every text still encodes.
    assert made.decode(made("Здравствуйте, 世界", add_special_tokens=False).input_ids) == "Здравствуйте, 世界"
    assert {"Ġthe", "Ġt", "he"} & set(made.get_vocab()) >= {"Ġthe"}


@pytest.mark.parametrize("shared", [True, False])
def test_both_stacks_heads_and_their_biases_follow(shared, tmp_path):
    tokenizer = trained("unigram")
    stack = SIZES | {"vocab_size": len(tokenizer)}
    config = VariantSeq2SeqConfig(
        encoder=stack, decoder=stack | {"lm_head_bias": True}, share_embeddings=shared, tie_word_embeddings=shared,
        final_logits_bias=True, unread_shared_embedding=not shared, decoder_start_token_id=2, **IDS,
    )  # fmt: skip
    model = hostile_(VariantForConditionalGeneration(config)).eval()
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    report = edit(tmp_path / "ours", tmp_path / "small", [TrimVocabulary(TEXT)])
    assert report.difference.same_bits
    made = VariantForConditionalGeneration.from_pretrained(tmp_path / "small")
    assert made.config.encoder.vocab_size == made.config.decoder.vocab_size == made.final_logits_bias.shape[1]
    assert made.config.decoder_start_token_id == 2


def test_positions_counted_from_the_padding_token_stay(tmp_path):
    tokenizer = trained("wordpiece")
    config = VariantConfig(
        **SIZES, vocab_size=len(tokenizer), pad_token_id=60, is_causal=False, position_embedding_type="learned",
        position_ids_source="input_ids", lm_head_bias=True, max_position_embeddings=128,
    )  # fmt: skip
    hostile_(VariantForMaskedLM(config)).save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    report = edit(tmp_path / "ours", tmp_path / "small", [TrimVocabulary("the dog")])
    assert report.difference.same_bits
    assert VariantForMaskedLM.from_pretrained(tmp_path / "small").config.pad_token_id == 60


def test_padding_and_extension(tmp_path):
    tokenizer = trained("byte bpe")
    config = VariantConfig(**SIZES, vocab_size=len(tokenizer), tie_word_embeddings=True, **IDS)
    model = hostile_(VariantForCausalLM(config)).eval()
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    operations = [TrimVocabulary(TEXT), ExtendVocabulary(["dogfox", "Привет"]), PadVocabulary(64)]
    report = edit(tmp_path / "ours", tmp_path / "new", operations)
    assert report.difference.same_bits
    made = AutoTokenizer.from_pretrained(tmp_path / "new")
    new = VariantForCausalLM.from_pretrained(tmp_path / "new")
    assert new.config.vocab_size % 64 == 0
    ids = made("dogfox", add_special_tokens=False).input_ids
    assert made.convert_ids_to_tokens(ids) == ["dogfox"]
    parts = tokenizer("dogfox", add_special_tokens=False).input_ids
    mean = model.model.embed_tokens.weight[parts].double().mean(0).float()
    assert torch.equal(new.model.embed_tokens.weight[ids[0]], mean)
    assert made.decode(made("Привет", add_special_tokens=False).input_ids) == "Привет"
    # In memory, where there is no tokenizer.
    padded = edit_model(model, [PadVocabulary(128)])
    sentence = torch.arange(12)[None]
    assert torch.equal(padded(sentence).logits[..., : config.vocab_size], model(sentence).logits)


def test_text_is_measured_over_two_vocabularies(tmp_path):
    tokenizer = trained("byte bpe")
    VariantForCausalLM(VariantConfig(**SIZES, vocab_size=len(tokenizer), **IDS)).save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    report = edit(tmp_path / "ours", tmp_path / "small", [TrimVocabulary(TEXT)], text=TEXT)
    assert report.text.perplexity_after < report.text.perplexity_before
    same = edit(tmp_path / "ours", tmp_path / "same", [PadVocabulary(1)], text=TEXT)
    assert same.text.kl == 0
    assert same.text.perplexity_after == same.text.perplexity_before


def test_layers_of_least_influence_go(tmp_path, capsys):
    tokenizer = trained("byte bpe")
    config = VariantConfig(**SIZES | {"num_hidden_layers": 5}, vocab_size=len(tokenizer), **IDS)
    model = hostile_(VariantForCausalLM(config)).eval()
    with torch.no_grad():
        for number, factor in enumerate((1, 0.01, 1, 1, 0.001)):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                model.model.layers[number].get_submodule(name).weight.mul_(factor)
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["edit", str(tmp_path / "ours"), str(tmp_path / "new"), "--text", str(tmp_path / "text.txt")]
    assert main([*command, "--drop-least", "2"]) == 0
    assert "layers 0,2-3 of 5" in capsys.readouterr().out
    made = VariantForCausalLM.from_pretrained(tmp_path / "new")
    assert torch.equal(made.model.layers[1].mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight)
    assert main(["edit", str(tmp_path / "ours"), str(tmp_path / "more"), "--drop-least", "2"]) == 2
    assert main([*command[:2], str(tmp_path / "more"), "--text", str(tmp_path / "text.txt"), "--drop-least", "5"]) == 2
    assert "Give 1 to 4" in capsys.readouterr().err


def test_layers_of_least_influence_go_from_one_of_two_stacks(tmp_path):
    tokenizer = trained("byte bpe")
    stack = SIZES | {"num_hidden_layers": 3, "vocab_size": len(tokenizer)}
    model = hostile_(VariantForConditionalGeneration(VariantSeq2SeqConfig(encoder=stack, decoder=stack, **IDS)))
    with torch.no_grad():
        for name in ("self_attn.o_proj", "cross_attn.o_proj", "mlp.down_proj"):
            model.model.decoder.layers[1].get_submodule(name).weight.mul_(0.001)
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["edit", str(tmp_path / "ours"), str(tmp_path / "new"), "--text", str(tmp_path / "text.txt")]
    assert main([*command, "--drop-least", "1", "--stack", "decoder"]) == 0
    made = VariantForConditionalGeneration.from_pretrained(tmp_path / "new").model
    assert [made.config.encoder.num_hidden_layers, made.config.decoder.num_hidden_layers] == [3, 2]
    assert torch.equal(made.decoder.layers[1].mlp.up_proj.weight, model.model.decoder.layers[2].mlp.up_proj.weight)


def test_refusals(tmp_path):
    tokenizer = trained("byte bpe")
    model = VariantForCausalLM(VariantConfig(**SIZES, vocab_size=len(tokenizer) - 1, **IDS))
    with pytest.raises(SurgeryError, match="model in memory"):
        edit_model(model, [TrimVocabulary(TEXT)])
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(SurgeryError, match="needs the tokenizer"):
        edit(tmp_path / "ours", tmp_path / "new", [TrimVocabulary(TEXT)])
    tokenizer.save_pretrained(tmp_path / "ours")
    with pytest.raises(SurgeryError, match=r"<\|call\|>"):
        edit(tmp_path / "ours", tmp_path / "new", [TrimVocabulary(TEXT)])
    with pytest.raises(SurgeryError, match="no token 'nonsense'"):
        edit(tmp_path / "ours", tmp_path / "new", [KeepTokens(["nonsense"])])
    with pytest.raises(SurgeryError, match="already"):
        edit(tmp_path / "ours", tmp_path / "new", [ExtendVocabulary(["<s>"])])
    with pytest.raises(SurgeryError, match="empty"):
        edit(tmp_path / "ours", tmp_path / "new", [TrimVocabulary("")])
    with pytest.raises(SurgeryError, match="multiple of 0"):
        edit(tmp_path / "ours", tmp_path / "new", [PadVocabulary(0)])
    two = VariantForConditionalGeneration(
        VariantSeq2SeqConfig(
            encoder=SIZES | {"vocab_size": 40}, decoder=SIZES | {"vocab_size": 50}, share_embeddings=False
        )
    )
    with pytest.raises(SurgeryError, match="40 and 50"):
        edit_model(two, [PadVocabulary(8)])
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["vocab_size"] == len(tokenizer) - 1

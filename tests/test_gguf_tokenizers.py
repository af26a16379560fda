"""Tokenizers in GGUF files: the same tokens as the stock classes and as the algorithms have them, or a reason."""

import itertools
import json

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, Qwen2Tokenizer, T5Tokenizer

import hf_variants
from hf_variants.conversion import ConversionError, convert
from hf_variants.conversion.gguf_files import read_tokenizer
from hf_variants.conversion.gguf_files.tokenizer import SPACE, WORDS
from tests import gguf_files
from tests.test_gguf_files import stock


TEXTS = (
    "The quick brown fox jumps over 12345 lazy dogs.",
    "it's we'll They'RE  two  spaces, a\ttab\n\n and lines",
    "naïve café ½ 北京 \u0301e",
    "def f(x): return x**2  # ok",
)
CORPUS = [*TEXTS, "the fox and the dog and the hen are quick; it is the end of the day" * 3]
ROLE = "<|role|>"


def write(path, architecture="llama", **keys):
    """A file with a tokenizer and one tensor; `name__x` stands for `name.x`."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in keys.items():
        name = f"tokenizer.{name.replace('__', '.')}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def byte_pairs():
    """Tokens, their kinds and merges: every byte, what a corpus gives, and a control token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    vocabulary = backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    return [*tokens, ROLE], [1] * len(tokens) + [3], merges


def byte_level(path, byte_pairs, pre, **keys):
    tokens, kinds, merges = byte_pairs
    return write(
        path,
        ggml__model="gpt2", ggml__pre=pre, ggml__tokens=tokens, ggml__token_type=kinds,
        ggml__merges=[" ".join(merge) for merge in merges], ggml__eos_token_id=len(tokens) - 1, **keys,
    )  # fmt: skip


@pytest.mark.parametrize(("pre", "stock_class"), [("gpt-2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer)])
def test_byte_pairs_are_the_stock_class_s(pre, stock_class, byte_pairs, tmp_path):
    tokens, _, merges = byte_pairs
    vocabulary = {token: number for number, token in enumerate(tokens)}
    reference = stock_class(vocab=vocabulary, merges=merges, unk_token=None, additional_special_tokens=[ROLE])
    made = read_tokenizer(byte_level(tmp_path / "m.gguf", byte_pairs, pre))
    for text in (*TEXTS, f"{ROLE}user\nhi{ROLE}"):
        assert made(text).input_ids == reference(text).input_ids, text
    assert made.eos_token == ROLE


def test_digits_are_cut_one_by_one_where_the_file_says_so(byte_pairs, tmp_path):
    made = read_tokenizer(byte_level(tmp_path / "m.gguf", byte_pairs, "smollm"))
    assert made.tokenize("a12345") == ["a", "1", "2", "3", "4", "5"]
    together = read_tokenizer(byte_level(tmp_path / "n.gguf", byte_pairs, "gpt-2"))
    assert len(together.tokenize("a12345")) < 6


def test_the_patterns_that_transformers_knows_as_well_are_the_same():
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    theirs = mapping.GGUF_PRE_TOKENIZER_SPLITS
    shared = theirs.keys() & WORDS.keys()
    assert len(shared) > 10
    assert {name: WORDS[name].patterns for name in shared} == {name: (theirs[name],) for name in shared}


def test_what_stands_before_and_behind_a_text(byte_pairs, tmp_path):
    last = len(byte_pairs[0]) - 1
    keys = {"ggml__bos_token_id": last}
    for pre, flags, bos, eos in (
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"ggml__add_bos_token": False}, False, False),
        ("gpt-2", {}, False, False),
        ("gpt-2", {"ggml__add_bos_token": True, "ggml__add_eos_token": True}, True, True),
    ):
        ids = read_tokenizer(byte_level(tmp_path / "m.gguf", byte_pairs, pre, **keys, **flags))("the").input_ids
        assert (ids[0] == last, ids[-1] == last) == (bos, eos)


def test_chat_templates(byte_pairs, tmp_path):
    path = byte_level(tmp_path / "m.gguf", byte_pairs, "gpt-2", chat_template="A", chat_template__tool_use="B")
    assert read_tokenizer(path).chat_template == {"default": "A", "tool_use": "B"}
    path = byte_level(tmp_path / "m.gguf", byte_pairs, "gpt-2", chat_template="A")
    assert read_tokenizer(path).chat_template == "A"


# sentencepiece

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS_OF_TEXT = [
    SPACE,
    *"thequickbrownfxjmpsvlazydg",
    "th",
    "the",
    SPACE + "the",
    "qu",
    "qui",
    "ck",
    "ow",
    "own",
    SPACE + "q",
    SPACE + "f",
    "ox",
]


def sentencepiece(path, **keys):
    letters = list(dict.fromkeys(WORDS_OF_TEXT))
    tokens = [*PIECES, *letters, ROLE]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(letters), 4]
    scores = [0.0] * 259 + [-float(number) for number in range(len(letters))] + [0.0]
    write(
        path,
        ggml__model="llama", ggml__tokens=tokens, ggml__scores=scores, ggml__token_type=kinds, ggml__bos_token_id=1,
        ggml__eos_token_id=2, ggml__unknown_token_id=0, **keys,
    )  # fmt: skip
    return dict(zip(tokens, range(len(tokens)))), dict(zip(tokens, scores))


def merged(text, vocabulary, scores):
    """sentencepiece's byte-pair encoding as it is defined: the neighbours with the best score, until there are none."""
    pieces = list(text.replace(" ", SPACE))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in vocabulary]
        if not pairs:
            break
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    ids = []
    for piece in pieces:
        ids += [vocabulary[piece]] if piece in vocabulary else [vocabulary[f"<0x{b:02X}>"] for b in piece.encode()]
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_by_score(prefix, tmp_path):
    keys = {} if prefix else {"ggml__add_space_prefix": False}
    vocabulary, scores = sentencepiece(tmp_path / "m.gguf", **keys)
    made = read_tokenizer(tmp_path / "m.gguf")
    for text in ("the quick fox", "the  quick é", "own thethe"):
        assert made(text).input_ids == [1, *merged(" " * prefix + text, vocabulary, scores)], text
        assert made.decode(made(text).input_ids, skip_special_tokens=True) == text
    assert vocabulary[ROLE] in made(f"the{ROLE}fox").input_ids


def test_word_pieces_are_berts(tmp_path):
    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "qui",
        "##ck",
        "fox",
        "##es",
        "cafe",
        ".",
        "北",
        "京",
        "it",
    ]
    reference = BertTokenizer(vocab={name: number for number, name in enumerate(names)})
    in_file = [n if n.startswith("[") else n[2:] if n.startswith("##") else SPACE + n for n in names]
    path = write(
        tmp_path / "m.gguf", "bert",
        ggml__model="bert", ggml__tokens=in_file, ggml__token_type=[3] * 5 + [1] * 10, ggml__cls_token_id=2,
        ggml__seperator_token_id=3, ggml__padding_token_id=0, ggml__unknown_token_id=1, ggml__mask_token_id=4,
    )  # fmt: skip
    made = read_tokenizer(path)
    for text in ("The quick foxes. Café", "it's 北京 [MASK]"):
        assert made(text).input_ids == reference(text).input_ids, text
    assert made("the", "fox").input_ids == reference("the", "fox").input_ids


def test_unigram_is_t5s(tmp_path):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -3.0), *((c, -4.0) for c in "thequickfox")]
    pieces = [*dict(pieces).items(), (SPACE + "the", -2.5), ("fox", -3.5), (SPACE + "quick", -2.0)]
    blanks = [(f"<extra_id_{number}>", 0.0) for number in range(99, -1, -1)]
    reference = T5Tokenizer(vocab=[*pieces, *blanks])
    tokens = [name for name, _ in pieces] + [f"[PAD{number}]" for number in range(100)]
    path = write(
        tmp_path / "m.gguf", "t5",
        ggml__model="t5", ggml__tokens=tokens, ggml__scores=[score for _, score in pieces] + [-10000.0] * 100,
        ggml__token_type=[3, 3, 2] + [1] * (len(pieces) - 3) + [5] * 100, ggml__remove_extra_whitespaces=True,
    )  # fmt: skip
    made = read_tokenizer(path)
    for text in ("the quick fox", "thefox  the", "a <extra_id_0> fox"):
        assert made(text).input_ids == reference(text).input_ids, text
    assert made.eos_token_id == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "no tokenizer"),
        ({"ggml__model": "rwkv", "ggml__tokens": ["a"]}, "'rwkv'"),
        ({"ggml__model": "gpt2", "ggml__pre": "new", "ggml__tokens": ["a"]}, "'new'"),
        ({"ggml__model": "gpt2", "ggml__pre": "gpt-2", "ggml__tokens": ["a", "a"]}, "another token"),
        ({"ggml__model": "gpt2", "ggml__pre": "gpt-2", "ggml__tokens": ["a"], "ggml__bos_token_id": 5}, "bos_token"),
        ({"ggml__model": "gpt2", "ggml__pre": "gpt-2", "ggml__tokens": ["a"], "ggml__merges": ["a b"]}, "merges"),
        ({"ggml__model": "llama", "ggml__tokens": ["a"]}, "scores"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_reason(keys, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        read_tokenizer(write(tmp_path / "m.gguf", **keys))


def test_the_converted_folder_has_the_file_s_tokenizer(byte_pairs, tmp_path, monkeypatch):
    model, path = stock("qwen2"), tmp_path / "m.gguf"
    tokens, kinds, merges = byte_pairs
    model.resize_token_embeddings(len(tokens))
    original = gguf.GGUFWriter

    class Writer(original):
        def write_header_to_file(self, *args, **kwargs):
            self.add_tokenizer_model("gpt2")
            self.add_tokenizer_pre("qwen2")
            self.add_token_list(tokens)
            self.add_token_types(kinds)
            self.add_token_merges([" ".join(merge) for merge in merges])
            super().write_header_to_file(*args, **kwargs)

    monkeypatch.setattr(gguf, "GGUFWriter", Writer)
    gguf_files.write(model, path, "qwen2")
    convert(path, tmp_path / "out", verify=True)
    made, reference = AutoTokenizer.from_pretrained(tmp_path / "out"), read_tokenizer(path)
    for text in (*TEXTS, ROLE):
        assert made(text).input_ids == reference(text).input_ids
    assert hf_variants.VariantForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == len(tokens)

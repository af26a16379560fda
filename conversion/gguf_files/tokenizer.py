"""The tokenizer in a GGUF file: built from what the file says and nothing else, or refused with the reason."""

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges
from transformers.utils import logging

from ..errors import ConversionError
from .container import GGUFFile


logger = logging.get_logger(__name__)

SPACE = "\u2581"
# The kinds of tokens, as sentencepiece numbers them.
CONTROL, USER_DEFINED = 3, 4
SPECIAL = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding", "cls_token": "cls",
    "sep_token": "seperator", "mask_token": "mask",
}  # fmt: skip
# What llama.cpp takes where a file is silent.
USUAL_IDS = {
    "llama": {"bos_token": 1, "eos_token": 2, "unk_token": 0},
    "t5": {"eos_token": 1, "unk_token": 2, "pad_token": 0},
    "bert": {"cls_token": 101, "unk_token": 100, "sep_token": 102, "pad_token": 0, "mask_token": 103},
}
# Of sentencepiece's vocabularies these list their merges in the order of their tokens, and others by their scores.
IN_ORDER = ("gemma", "gemma2", "gemma3", "gemma-embedding")
# T5's blanks, which files call unused.
T5_BLANKS = 100

# How text is cut into words before it is encoded; the patterns are those of the published tokenizers.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + r"+{0}|[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*{0}|"
_TEKKEN = _CASED.replace("{0}", "") + r"\p{N}|" + _TAIL_WITH_SLASH
_GPT4O = _CASED.replace("{0}", _CONTRACTIONS + "?") + r"\p{N}{1,3}|" + _TAIL_WITH_SLASH
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_SEED = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip


@dataclass(frozen=True)
class Words:
    """
    A way to cut text, which `tokenizer.ggml.pre` names.

    Args:
        patterns: applied in turn, each to what the one before has cut.
        nfc: whether the published tokenizers compose characters first.
        ignores_merges: whether a word that is a token is one, however it would merge.
        adds_bos: where a file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False


_WORDS = {
    Words((_GPT2,)): (
        "gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum",
        "roberta-bpe", "jina-v1-en", "jina-v2-code", "exaone4", "mpt", "jais", "trillion", "granite-docling",
    ),
    Words((_GPT2,), nfc=True): ("olmo", "modern-bert"),
    Words((r"\p{N}", _GPT2)): ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"),
    Words((_LLAMA3,), ignores_merges=True, adds_bos=True): (
        "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
    ),
    Words((_LLAMA3,)): ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    Words((_QWEN2,), nfc=True): ("qwen2", "deepseek-r1-qwen", "megrez", "kormo"),
    Words((_QWEN2,)): ("stablelm2", "hunyuan", "solar-open"),
    Words((_TEKKEN,), ignores_merges=True, adds_bos=True): ("tekken",),
    Words((_GPT4O,)): ("gpt-4o", "llama4", "kanana2"),
    Words((_BLOOM,)): ("bloom", "poro-chat", "gpt3-finnish"),
    Words((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")): ("falcon",),
    Words(_DEEPSEEK3): ("deepseek-v3", "hunyuan-dense"),
    Words((_SEED,)): ("seed-coder",),
}  # fmt: skip
WORDS = {name: words for words, names in _WORDS.items() for name in names}


def tokenizer_of(file: GGUFFile) -> PreTrainedTokenizerFast:
    """
    The tokenizer that a file describes.

    Raises:
        ConversionError: if it has none, or one of a kind that cannot be built from what the file says.
    """
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    kind, tokens = values.get("model"), values.get("tokens")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece, "bert": _word_piece, "t5": _unigram}
    if not tokens or kind in (None, "none", "no_vocab"):
        raise ConversionError(f"{file.path} has no tokenizer. Take the one of the model that it was made from.")
    if kind not in builders:
        raise ConversionError(
            f"`tokenizer.ggml.model` of {file.path} is {kind!r}, and only {sorted(builders)} can be built. Take the "
            "tokenizer of the model that it was made from."
        )
    ids = {name: values.get(f"{theirs}_token_id") for name, theirs in SPECIAL.items()}
    usual = {} if file.architecture == "bert" and kind == "t5" else USUAL_IDS.get(kind, {})
    ids = {name: usual.get(name) if number is None else number for name, number in ids.items()}
    outside = {name: number for name, number in ids.items() if number is not None and number >= len(tokens)}
    for name, number in outside.items():
        if values.get(f"{SPECIAL[name]}_token_id") is not None:
            raise ConversionError(f"`{name}` of {file.path} is {number}, and there are {len(tokens)} tokens.")
        ids[name] = None
    backend, names = builders[kind](file, values, tokens, ids)
    made = [backend.id_to_token(number) for number in range(len(names))]
    if made != names:
        wrong = next(number for number, (a, b) in enumerate(zip(made, names)) if a != b)
        raise ConversionError(
            f"Token {wrong} of {file.path} is {names[wrong]!r}, which another token is called as well. Take the tokenizer "
            "of the model that it was made from."
        )
    special = {name: names[number] for name, number in ids.items() if number is not None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=file.metadata.get(f"{file.architecture}.context_length"),
        **special,
    )
    templates = {
        key.removeprefix("tokenizer.chat_template."): value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.chat_template.")
    }
    default = file.metadata.get("tokenizer.chat_template")
    tokenizer.chat_template = (
        {"default": default, **templates} if templates and default else default or templates or None
    )
    return tokenizer


def _added(backend: Tokenizer, values: dict[str, Any], names: list[str], plain: frozenset[str] = frozenset()) -> None:
    """Tokens that stand in a text as they are: control tokens, and what users have added; `plain` ones are none."""
    kinds = values.get("token_type") or []
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [
            AddedToken(name, normalized=False, special=special)
            for name, of_token in zip(names, kinds)
            if of_token == kind and name not in plain
        ]
        if special:
            backend.add_special_tokens(found)
        else:
            backend.add_tokens(found)


def _frame(backend: Tokenizer, names: list[str], first: int | None, last: int | None, between: int | None) -> None:
    """Tokens before and behind a text, and between two."""
    before, behind, middle = ([] if number is None else [names[number]] for number in (first, last, between))
    if not before and not behind:
        return
    special = [(names[number], number) for number in {first, last, between} - {None}]
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A:0", *behind, *middle, "$B:1", *(f"{token}:1" for token in behind)],
        special_tokens=special,
    )


def _ends(values: dict[str, Any], ids: dict[str, int | None], bos: bool, eos: bool) -> tuple[int | None, int | None]:
    first = ids["bos_token"] if values.get("add_bos_token", bos) else None
    last = ids["eos_token"] if values.get("add_eos_token", eos) else None
    return first, last


def _byte_level(file, values, tokens, ids):
    name = values.get("pre")
    words = WORDS.get(name)
    if name in (None, "default"):
        logger.warning(
            f"{file.path} does not say how its tokenizer cuts text into words (`tokenizer.ggml.pre`). GPT-2's way is "
            "taken; compare the tokens with those of the model that it was made from."
        )
        words = WORDS["gpt-2"]
    if words is None:
        raise ConversionError(
            f"`tokenizer.ggml.pre` of {file.path} is {name!r}, a way to cut text into words that is not known here. "
            "Take the tokenizer of the model that it was made from."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("merges") or []]
    backend = Tokenizer(_bpe(file, tokens, merges, ignore_merges=words.ignores_merges))
    backend.normalizer = normalizers.NFC() if words.nfc else None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in words.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=bool(values.get("add_space_prefix")), use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    _added(backend, values, tokens)
    # RoBERTa's way has a separator at the end.
    framed = name in ("roberta-bpe", "jina-v1-en", "jina-v2-code") or file.architecture in ("bert", "modern-bert")
    first, last = _ends(values, ids, bos=words.adds_bos or framed, eos=framed)
    between = last if file.architecture == "bert" else None
    _frame(backend, tokens, first, last, between)
    return backend, tokens


def _bpe(file: GGUFFile, tokens: list[str], merges: list[tuple[str, ...]], **options: Any) -> BPE:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        return BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as error:
        # `tokenizers` raises plain exceptions.
        raise ConversionError(f"The merges of {file.path} do not fit its tokens ({error}).") from error


def _sentencepiece(file, values, tokens, ids):
    """Byte-pair encoding with merges by score; a space is a character like any other."""
    plain = frozenset()
    names = list(tokens)
    if file.architecture in IN_ORDER:
        # Runs of spaces are merged from single ones, and files spell them out.
        names = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
        plain = frozenset(name for name, token in zip(names, tokens) if name != token)
        scores = {name: -number for number, name in enumerate(names)}
    else:
        if values.get("scores") is None:
            raise ConversionError(f"{file.path} has no scores for its tokens, by which they merge. It is incomplete.")
        scores = dict(zip(names, values["scores"]))
    kinds = values.get("token_type") or [1] * len(names)
    whole = {name for name, kind in zip(names, kinds) if kind in (CONTROL, USER_DEFINED) and name not in plain}
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = generate_merges(vocabulary, scores, skip_tokens=whole)
    unknown = ids["unk_token"]
    options = {} if unknown is None else {"unk_token": names[unknown]}
    backend = Tokenizer(_bpe(file, names, merges, fuse_unk=True, byte_fallback=True, **options))
    prefix = values.get("add_space_prefix", True)
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _added(backend, values, names, plain)
    first, last = _ends(values, ids, bos=True, eos=False)
    _frame(backend, names, first, last, None)
    return backend, names


def _word_piece(file, values, tokens, ids):
    """BERT's, whose words begin with a mark in the file, where natively their other pieces do."""
    kinds = values.get("token_type") or [1] * len(tokens)
    names = [
        token if kind == CONTROL else token.removeprefix(SPACE) if token.startswith(SPACE) else f"##{token}"
        for token, kind in zip(tokens, kinds)
    ]
    # No key says it; a vocabulary of lower case has no capitals but in control tokens.
    lower = not any(any("A" <= letter <= "Z" for letter in n) for n, k in zip(names, kinds) if k == 1 and "[" not in n)
    unknown = names[ids["unk_token"]] if ids["unk_token"] is not None else "[UNK]"
    backend = Tokenizer(WordPiece({name: number for number, name in enumerate(names)}, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    _added(backend, values, names)
    first = ids["cls_token"] if ids["bos_token"] is None else ids["bos_token"]
    _frame(backend, names, first, ids["sep_token"], None)
    return backend, names


def _unigram(file, values, tokens, ids):
    if values.get("scores") is None or ids["unk_token"] is None:
        raise ConversionError(f"{file.path} lacks the scores of its tokens or the unknown one. It is incomplete.")
    names = list(tokens)
    if file.architecture.startswith("t5"):
        blanks = [number for number, name in enumerate(names) if name.startswith("[PAD")][:T5_BLANKS]
        for offset, number in enumerate(blanks):
            names[number] = f"<extra_id_{T5_BLANKS - 1 - offset}>"
    backend = Tokenizer(Unigram(list(zip(names, values["scores"])), unk_id=ids["unk_token"], byte_fallback=False))
    charsmap = values.get("precompiled_charsmap")
    steps: list[normalizers.Normalizer] = []
    if charsmap:
        steps.append(normalizers.Precompiled(bytes(number & 0xFF for number in charsmap)))
    if values.get("remove_extra_whitespaces", False):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence(steps)
    scheme = "always" if values.get("add_space_prefix", True) else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme)
    _added(backend, values, names)
    if file.architecture.startswith("t5"):
        backend.add_special_tokens([name for name in names if name.startswith("<extra_id_")])
    of_encoder = file.architecture == "bert"
    first, last = _ends(values, ids, bos=of_encoder, eos=True)
    _frame(backend, names, first, last, last if of_encoder else None)
    return backend, names

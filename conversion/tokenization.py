"""Whether two tokenizers are the same: class, vocabulary, settings, and what they make of texts and conversations."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from .errors import ConversionError
from .gguf_files import read_tokenizer
from .limits import bounded


TEXTS = (
    "", " ", "The quick brown fox jumps over the lazy dog.", "naïve café, 北京, Привет, 👩‍👧, ﬁ ½ Å",
    "\n\ttabs  and   spaces \r\n",
    "def f(x: int) -> int:\n    return x**2  # squares\n", "1234567890 3.14 1,000", "don't WON'T I'm", "\u200b\u00a0\ufeff",
)  # fmt: skip
MESSAGES = (
    [{"role": "user", "content": "Hello."}],
    [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}, {"role": "user", "content": " So? "}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
)
SETTINGS = (
    "special_tokens_map", "all_special_ids", "chat_template", "padding_side", "truncation_side", "model_max_length",
    "model_input_names", "clean_up_tokenization_spaces",
)  # fmt: skip
RANDOM_TEXTS = 24


def load_tokenizer(source: Path, repository: str | None = None) -> Any:
    """
    What `AutoTokenizer` reads from a folder, without running code of its own, or what a GGUF file describes; or, as a
    text, why there is nothing.

    Args:
        repository: the Hub id under which transformers may know the tokenizer.
    """
    options: dict[str, Any] = {"trust_remote_code": False}
    if source.is_file():
        try:
            return read_tokenizer(source)
        except ConversionError as error:
            return str(error)
    try:
        if repository is not None:
            options["config"] = AutoConfig.from_pretrained(source, trust_remote_code=False)
            options["config"]._name_or_path = repository
        return AutoTokenizer.from_pretrained(source, **options)
    # Tokenizers, their converters and the libraries behind them raise errors of every class.
    except Exception as error:
        if "trust_remote_code" in str(error):
            return "AutoTokenizer cannot read the tokenizer without code of its own, which is never run"
        return (
            f"AutoTokenizer cannot read the tokenizer ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"
        )


def differences(a: Any, b: Any) -> list[str]:
    """In which respects two tokenizers differ, shortly; none if they are the same."""
    if type(a).__name__ != type(b).__name__:
        return [f"classes {type(a).__name__} and {type(b).__name__}"]
    found = [
        f"{name}: {x!r:.80} and {y!r:.80}"
        for name in SETTINGS
        if (x := getattr(a, name, None)) != (y := getattr(b, name, None))
    ]
    for name in ("truncation", "padding"):
        x, y = (getattr(getattr(tokenizer, "backend_tokenizer", None), name, None) for tokenizer in (a, b))
        if x != y:
            found.append(f"{name} of the file: {x!r:.80} and {y!r:.80}")
    first, second = _vocabulary(a), _vocabulary(b)
    if first != second:
        found.append(f"vocabularies of {len(first)} and {len(second)} tokens: {_some(first, second)}")
    first, second = ({id: repr(token) for id, token in t.added_tokens_decoder.items()} for t in (a, b))
    if first != second:
        found.append(f"added tokens: {_some(first, second)}")
    with _as_it_was(a), _as_it_was(b):
        for name, probe in _probes(a):
            x, y = _outcome(probe, a), _outcome(probe, b)
            if x != y:
                found.append(f"{name}: {x!r:.80} and {y!r:.80}")
                break
    return found


def are_alike(a: Any, b: Any) -> bool:
    """
    Whether two tokenizers are the same by what they hold, which is quickly seen of small ones; of others than those of
    the tokenizers library that is not known.
    """
    held = []
    for tokenizer in (a, b):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return False
        settings = [repr(getattr(tokenizer, name, None)) for name in (*SETTINGS, "added_tokens_decoder")]
        held.append((type(tokenizer), settings, backend.to_str()))
    return held[0] == held[1]


@contextmanager
def _as_it_was(tokenizer: Any) -> Iterator[None]:
    """A call sets padding and truncation in the tokenizer itself, which would be saved with them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = getattr(backend, "truncation", None), getattr(backend, "padding", None)
    try:
        yield
    finally:
        if backend is not None:
            backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
            backend.enable_padding(**padding) if padding else backend.no_padding()


def ids_that_differ(a: Any, b: Any) -> str | None:
    """The first text of which two tokenizers make other ids, or a conversation that they write otherwise."""
    for text in probe_texts(a):
        for special in (True, False):

            def ids(tokenizer: Any, text: str = text, special: bool = special) -> list[int]:
                return tokenizer(text, add_special_tokens=special).input_ids

            if (x := _outcome(ids, a)) != (y := _outcome(ids, b)):
                return f"ids of {text!r:.40}: {x!r:.60} and {y!r:.60}"
    if a.chat_template != b.chat_template:
        return "the chat template"
    return None


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    return _outcome(lambda t: t.get_vocab(), tokenizer)


def _some(a: dict, b: dict) -> str:
    keys = sorted((key for key in a.keys() | b.keys() if a.get(key) != b.get(key)), key=str)
    return ", ".join(f"{key!r}: {a.get(key)} and {b.get(key)}" for key in keys[:3])


def _outcome(probe: Callable[[Any], Any], tokenizer: Any) -> Any:
    """What comes out; an error is an outcome, too."""
    try:
        with bounded("The tokenizer or its template"):
            return probe(tokenizer)
    except Exception as error:
        return type(error).__name__


def probe_texts(tokenizer: Any) -> list[str]:
    """Texts of all kinds, among them every special and added token and what random ids stand for."""
    generator = random.Random(len(tokenizer))
    special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    special += [token for token in tokenizer.all_special_tokens if token not in special]
    texts = list(TEXTS)
    texts += [f"a {token}b{token} {token}" for token in special[:32]] + [" ".join(special)]
    # All of them, where there are too many for one text each.
    texts += ["".join(special[start : start + 50]) for start in range(0, len(special), 50)]
    for _ in range(RANDOM_TEXTS):
        ids = [generator.randrange(max(len(tokenizer), 1)) for _ in range(12)]
        text = _outcome(lambda t, ids=ids: t.decode(ids), tokenizer)
        texts.append(text)
    return texts


def _probes(tokenizer: Any) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    texts = probe_texts(tokenizer)
    for text in texts:
        yield f"ids of {text!r:.40}", lambda t, text=text: dict(t(text))
        yield f"ids of {text!r:.40} alone", lambda t, text=text: t(text, add_special_tokens=False).input_ids
        yield f"{text!r:.40} as a target", lambda t, text=text: dict(t(text_target=text))
        yield f"{text!r:.40} and back", lambda t, text=text: t.decode(t(text).input_ids)
        yield (
            f"{text!r:.40} and back, without special tokens",
            lambda t, text=text: t.decode(t(text).input_ids, skip_special_tokens=True),
        )
    yield "ids of a pair", lambda t: dict(t(texts[2], texts[3]))
    yield "ids of a padded batch", lambda t: dict(t(texts[:6], padding=True))
    yield "ids of a truncated text", lambda t: dict(t(texts[2], truncation=True, max_length=5))
    if getattr(tokenizer, "chat_template", None):
        for messages in MESSAGES:
            yield (
                "a conversation",
                lambda t, messages=messages: t.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                ),
            )

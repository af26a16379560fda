"""llama.cpp itself, through the package `llama-cpp-python` where that is installed."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ....model.configuration_variant import VariantConfig
from ...gguf_files.container import FLOATS, GGUFFile, gguf_package
from ...tokenization import probe_texts
from ...verification import Check, relative_error
from .target import head_of


PACKAGE = "llama-cpp-python"
NAME = "outputs of llama.cpp"
LENGTH = 48
TOKENS = 16
# A context has as many tokens at least, and whole steps of them.
STEP = 256
# Of sums in another order; and how many times what rounded activations lose in our own model, where matrices are rounded.
BOUND, TIMES = 1e-4, 4


def package() -> ModuleType | None:
    """The package, or `None` where it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        return None
    return llama_cpp


def check(path: Path, read: PreTrainedModel, tokenizer: Any) -> tuple[list[Check], list[str]]:
    """
    Compare what llama.cpp computes from a file with what our reader's model does, in float32 both.

    Args:
        read: ours, from the same file.
        tokenizer: that the file was written with, or `None` for a file without tokens.
    """
    library = package()
    if library is None:
        return [], [f"llama.cpp itself was not run: the package `{PACKAGE}` is not installed"]
    config = read.config
    limit = _stack(config).max_position_embeddings
    length = min(LENGTH, limit - TOKENS)
    context = -(-(length + TOKENS) // STEP) * STEP
    if length <= _original_context(config) < context:
        return [], [f"llama.cpp itself was not run: it takes a long RoPE's long factors from a context of {STEP} on"]
    kinds = {info.kind for info in GGUFFile(path).tensors.values() if len(info.shape) > 1}
    ids = torch.randint(3, _stack(config).vocab_size, (length,), generator=_generator())
    try:
        with _running(library, path, config, context) as run:
            made = run.outputs(ids.tolist())
            ours = _ours(read, ids)
            lost = max(relative_error(_ours(read, ids, kind), ours) for kind in kinds)
            bound = max(BOUND, TIMES * lost)
            error = relative_error(made, ours)
            checks = [Check(NAME, error <= bound, f"{error:.1e} of their spread away, {bound:.0e} allowed")]
            if head_of(config) == "causal_lm":
                checks.append(_tokens(run, read, ids, bound))
            notes = [] if tokenizer is None else [_texts(run, tokenizer)]
    except RuntimeError as error:
        return [Check(NAME, False, str(error))], []
    return checks, notes


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _stack(config: Any) -> VariantConfig:
    return config if isinstance(config, VariantConfig) else config.encoder


def _original_context(config: Any) -> int:
    """The length from which a long RoPE has other factors; 0 for none."""
    stack = _stack(config)
    rotations = filter(None, map(stack.rope_parameters_of, range(stack.num_hidden_layers)))
    return max((r["original_max_position_embeddings"] for r in rotations if r["rope_type"] == "longrope"), default=0)


@torch.no_grad()
def _ours(read: PreTrainedModel, ids: torch.Tensor, kind: str | None = None) -> torch.Tensor:
    """
    Our outputs.

    Args:
        kind: a number format of matrices, with which what multiplies them is rounded as there, and GELU is looked up in a
            table; `None` for neither.
    """
    hooks = []
    for module in read.modules() if kind is not None else ():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(lambda _, inputs: (_rounded(inputs[0], kind),)))
        elif "gelu" in type(module).__name__.lower():
            hooks.append(module.register_forward_hook(lambda _, inputs, output: _looked_up(inputs[0])))
    try:
        return _outputs(read, ids)
    finally:
        for hook in hooks:
            hook.remove()


def _looked_up(tensor: torch.Tensor) -> torch.Tensor:
    """GELU's tanh form of inputs in half precision, in half precision."""
    return F.gelu(tensor.half().float(), approximate="tanh").half().float()


def _rounded(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """Activations, (..., channels), as the kernels of a number format take them."""
    if kind in FLOATS:
        return tensor.to(FLOATS[kind]).to(tensor.dtype)
    package = gguf_package()
    form = package.GGMLQuantizationType[kind]
    if tensor.shape[-1] % package.GGML_QUANT_SIZES[form][0]:
        # As their matrices are.
        return _rounded(tensor, "F16")
    made = package.dequantize(package.quantize(tensor.contiguous().numpy(), form), form)
    return torch.from_numpy(made).reshape(tensor.shape)


def _outputs(read: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    if head_of(read.config) == "seq2seq_lm":
        return read(ids[None], decoder_input_ids=ids.flip(0)[None]).logits[0]
    return read(ids[None])[0][0]


def _tokens(run: "_Run", read: PreTrainedModel, ids: torch.Tensor, bound: float) -> Check:
    """Greedy tokens, each given the engine's own before it: ours, or one whose score is as high up to the bound."""
    name = f"{TOKENS} of llama.cpp's greedy tokens"
    sequence = ids.tolist()
    made = run.greedy(sequence, TOKENS)
    with torch.no_grad():
        scores = read(torch.tensor([sequence + made])).logits[0, len(sequence) - 1 : -1]
    best = scores.argmax(-1)
    same = int((best == torch.tensor(made)).sum())
    behind = (scores.max(-1).values - scores[torch.arange(TOKENS), made]) / scores.std()
    ok = bool((behind <= 2 * bound).all())
    return Check(name, ok, f"{same} are ours; the others score {behind.max():.1e} of the spread less")


def _texts(run: "_Run", tokenizer: Any) -> str:
    """A note on whether llama.cpp cuts texts as the tokenizer does: how it normalises them, a file does not say."""
    texts = [text for text in probe_texts(tokenizer) if isinstance(text, str)]
    others = [text for text in texts if run.ids(text) != tokenizer(text).input_ids]
    if not others:
        return f"llama.cpp cuts all {len(texts)} probe texts as the tokenizer does"
    return f"llama.cpp cuts {len(others)} of {len(texts)} probe texts otherwise, such as {others[0]!r:.60}"


class _Run:
    """A model of llama.cpp with its context."""

    def __init__(self, library: ModuleType, model: Any, context: Any, config: Any):
        self._library, self._model, self._context, self._config = library, model, context, config
        self._size = _stack(config).vocab_size

    def _batch(self, ids: list[int], start: int) -> Any:
        batch = self._library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = 1
        return batch

    def _call(self, function: Any, ids: list[int], start: int = 0) -> None:
        batch = self._batch(ids, start)
        failed = function(self._context, batch)
        self._library.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama.cpp stops with {failed} while it computes")

    def _rows(self, get: Any, count: int, width: int) -> torch.Tensor:
        rows = [ctypes.cast(get(self._context, index), ctypes.POINTER(ctypes.c_float)) for index in range(count)]
        if not all(rows):
            raise RuntimeError("llama.cpp gives no outputs")
        return torch.tensor([row[:width] for row in rows])

    def outputs(self, ids: list[int]) -> torch.Tensor:
        """Logits, or an encoder's hidden states, float32 (tokens, width)."""
        library, kind = self._library, head_of(self._config)
        if kind == "base":
            self._call(library.llama_encode, ids)
            return self._rows(library.llama_get_embeddings_ith, len(ids), self._config.hidden_size)
        if kind == "seq2seq_lm":
            self._call(library.llama_encode, ids)
            ids = ids[::-1]
        else:
            self.forget()
        self._call(library.llama_decode, ids)
        return self._rows(library.llama_get_logits_ith, len(ids), self._size)

    def ids(self, text: str) -> list[int]:
        """Of a text, with the special tokens that belong before and behind it, and those in it."""
        raw = text.encode("utf-8", errors="replace")
        vocabulary = self._library.llama_model_get_vocab(self._model)
        room = (self._library.llama_token * (len(raw) + 8))()
        return list(room[: self._library.llama_tokenize(vocabulary, raw, len(raw), room, len(room), True, True)])

    def forget(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """Its own tokens, one by one."""
        self.forget()
        self._call(self._library.llama_decode, ids)
        made: list[int] = []
        last = len(ids) - 1
        while len(made) < count:
            row = self._library.llama_get_logits_ith(self._context, last)
            made.append(int(torch.tensor(row[: self._size]).argmax()))
            self._call(self._library.llama_decode, made[-1:], start=len(ids) + len(made) - 1)
            last = 0
        return made


@contextmanager
def _running(library: ModuleType, path: Path, config: Any, length: int) -> Iterator[_Run]:
    """
    Raises:
        RuntimeError: if llama.cpp does not load the file; with what it says.
    """
    said: list[str] = []

    @library.llama_log_callback
    def log(level: int, text: bytes, data: Any) -> None:
        said.append(text.decode("utf-8", errors="replace"))

    library.llama_log_set(log, ctypes.c_void_p(0))
    library.llama_backend_init()
    arguments = library.llama_model_default_params()
    arguments.n_gpu_layers = 0
    model = library.llama_model_load_from_file(str(path).encode(), arguments)
    if not model:
        raise RuntimeError(f"llama.cpp does not load the file: {_errors(said)}")
    settings = library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = length
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    # Keys and values in float32, and the attention written out.
    settings.type_k = settings.type_v = 0
    settings.flash_attn_type = 0
    if head_of(config) == "base":
        settings.embeddings, settings.pooling_type = True, 0
    context = library.llama_init_from_model(model, settings)
    try:
        if not context:
            raise RuntimeError(f"llama.cpp does not start the model: {_errors(said)}")
        yield _Run(library, model, context, config)
    finally:
        if context:
            library.llama_free(context)
        library.llama_model_free(model)
        library.llama_log_set(library.llama_log_callback(0), ctypes.c_void_p(0))


def _errors(said: list[str]) -> str:
    """The last things that it said which speak of an error."""
    found = [line.strip() for line in "".join(said).splitlines() if "error" in line.lower() or "fail" in line.lower()]
    return " ".join("; ".join(found[:2]).split())[:300] or "no reason given"

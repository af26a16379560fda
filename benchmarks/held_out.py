"""Other packages' figures of some configs beside ours and the built model's: results/held-out.json, docs/held-out.md.

pip install calflops ptflops fvcore hf-mem accelerate deepspeed      # in an environment of their own, with transformers
python benchmarks/held_out.py --python ENVIRONMENT/bin/python        # runs them, and writes both files
python benchmarks/held_out.py                                        # the page alone, from the results
"""

import argparse
import json
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "held-out.json"
PAGE = ROOT / "docs" / "held-out.md"
SMALL = {"vocab_size": 4000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
LLAMA = {**SMALL, "intermediate_size": 704, "num_key_value_heads": 2, "max_position_embeddings": 512}
# Name -> class, config's class, fields.
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama, grouped queries": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "gemma2, windows": (
        "Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "head_dim": 64, "sliding_window": 32, "num_hidden_layers": 4}
    ),
    "gemma3, windows": (
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "head_dim": 64, "sliding_window": 32, "num_hidden_layers": 6}
    ),
    "mistral, windows alone": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": 32}),
    "gpt2, tied": (
        "GPT2LMHeadModel", "GPT2Config", {"vocab_size": 4000, "n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 512}
    ),
    "bert": ("BertForMaskedLM", "BertConfig", {**SMALL, "intermediate_size": 1024}),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 4000, "d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 4, "num_heads": 8,
         "decoder_start_token_id": 0},
    ),
}  # fmt: skip


def run(python: str) -> dict[str, Any]:
    """What the tools say, and what we do."""
    import transformers

    from hf_variants.cost import Plan, cost

    with tempfile.TemporaryDirectory() as folder:
        for name, (class_name, config_name, fields) in CONFIGS.items():
            config = getattr(transformers, config_name)(**fields, architectures=[class_name])
            config.save_pretrained(Path(folder) / name)
        script = Path(__file__).with_name("held_out_tools.py")
        output = subprocess.run([python, script, folder], check=True, stdout=subprocess.PIPE, text=True).stdout
        report = json.loads(output.splitlines()[-1])
        for name, found in report["configs"].items():
            options = {"batch": report["batch"], "length": report["length"], "dtype": "float32"}
            ours = cost(str(Path(folder) / name), **options)
            found["ours"] = {
                "parameters": ours.parameters.total,
                "flops": ours.forward.dense,
                "cache": ours.cache.dynamic if ours.cache else None,
                "cache_reserved": ours.cache.static if ours.cache else None,
                "training": ours.memory[0].total,
                "zero": {
                    str(stage): cost(
                        str(Path(folder) / name), batch=1, length=8, plan=Plan(dp=2, zero=stage, optimizer="adamw-mixed")
                    ).memory[0].total
                    for stage in (2, 3)
                },
            }  # fmt: skip
    return {"kind": "held-out"} | report | {"date": datetime.now(timezone.utc).date().isoformat()}


WHO_IS_RIGHT = """
## Who is right, and why

**Parameters.** Tools that look at a model that was built agree with it. `accelerate estimate-memory` builds one itself,
from the config: with `AutoModel`, which leaves out what stands on it (a Llama's untied head; BERT's, in whose place
comes a pooler), and under `init_empty_weights`, which makes every parameter anew, so that T5's one table counts once
for each place that reads it. `model.num_parameters()` and the bytes of a saved checkpoint say otherwise. What it has
more of Gemma are buffers, which have bytes as well.

**Operations.** The counters replace functions or read a trace, and `scaled_dot_product_attention`, which every class
here takes by default but Gemma 2, is none that they know on a CPU: both products of attention are missing, and the
longer the input, the more. On eager attention they agree but for what they count beside the products: norms, softmax,
activations. fvcore and ptflops count a multiplication and an addition as one and are doubled here. `FlopCounterMode`
counts zero for the kernel of a CPU, too, which is why the proof is eager.

**Cache.** hf-mem takes every layer of a stack that mixes windows with full attention as full, and says so: engines
reserve pages of one size. transformers' `DynamicCache` keeps the windows alone, so that it is a bound, not what is
there. Of a stack of windows alone (Mistral) its comment says that the window caps it, but it looks for `layer_types`,
which such a config lacks, and takes every layer as full: at Mistral 7B v0.1's 32,768 tokens and windows of 4,096, 8
times what its cache holds. Where a config has GPT-2's or T5's names for its sizes it ends in a `KeyError`.

**Training state.** DeepSpeed's estimator of ZeRO 2 counts, beside the gradient in 16 bits, one in 32 (2 + 18 / N bytes
for a parameter); the paper has 2 + 14 / N (https://arxiv.org/abs/1910.02054, figure 1), and so have we. Which its
engine holds hangs on its settings, and was not measured here. Of ZeRO 3 it adds 4 bytes for a parameter of the largest
layer, which is gathered; we count what is held between steps. accelerate has 16 bytes for a parameter, as we have, of
what it counts as parameters.
"""


FIGURES = {
    "parameters": ("Parameters", "parameters", ("calflops", "ptflops", "fvcore", "accelerate", "deepspeed")),
    "flops": ("Operations of a forward", "flops", ("calflops", "ptflops", "fvcore")),
    "cache": ("Bytes of the cache", "cache", ("hf-mem",)),
}


def page(report: dict[str, Any]) -> str:
    """The page, of a report."""
    versions = report["versions"]
    tools = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# Other packages' figures beside ours",
        "",
        "Written by `python benchmarks/held_out.py` from `benchmarks/results/held-out.json`; no number here was typed.",
        f"Stock classes with random weights, {report['batch']} sequence of {report['length']} tokens (of an",
        "encoder-decoder: source and target of as many), float32. *built* is the proof: the parameters of",
        "the model itself, each tied one once;",
        "torch's `FlopCounterMode` on its eager attention; the bytes of the tensors in its own `DynamicCache`. In brackets:",
        "by how much a figure differs from the proof. No stock class here builds layers that differ in more than their",
        "windows (`per_layer_config` of a Llama raises), so those are not compared.",
        "",
        f"{tools}.",
    ]
    for title, key, names in FIGURES.values():
        by_attention = key == "flops"
        columns = [
            (name, attention) for name in names for attention in (("sdpa", "eager") if by_attention else ("eager",))
        ]
        heads = [f"{name}, {attention}" if by_attention else name for name, attention in columns]
        lines += ["", f"## {title}", "", "| config | built | ours | " + " | ".join(heads) + " |",
                  "|---|" + "---|" * (2 + len(heads))]  # fmt: skip
        for name, found in report["configs"].items():
            truth = found["built"].get(key)
            if truth is None:
                continue
            cells = [f"{truth:,}", _beside(found["ours"][key], truth)]
            for tool, attention in columns:
                said = found["tools"].get(tool, {}).get(attention, {})
                cells.append(_beside(said[key], truth) if key in said else _refusal(said))
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "## Training state of one of two devices, bytes for a parameter", "",
              "| config | DeepSpeed, ZeRO 2 | ours | DeepSpeed, ZeRO 3 | ours | accelerate, Adam, one device | ours |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, found in report["configs"].items():
        count = found["built"]["parameters"]
        zero, training = (
            found["tools"]["deepspeed"]["eager"]["zero"],
            found["tools"]["accelerate"]["eager"]["training"],
        )
        cells = [
            said / count
            for stage in ("2", "3") for said in (zero[stage], found["ours"]["zero"][stage])
        ] + [training / count, found["ours"]["training"] / count]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join([*lines, "", WHO_IS_RIGHT.strip(), ""])


def _beside(said: int, truth: int) -> str:
    return f"{said:,}" + ("" if said == truth else f" ({said / truth - 1:+.1%})")


def _refusal(said: dict[str, Any]) -> str:
    return said["error"].split(":")[0] if "error" in said else "–"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="of an environment that has the packages")
    arguments = parser.parse_args()
    if arguments.python:
        RESULTS.write_text(json.dumps(run(arguments.python), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")

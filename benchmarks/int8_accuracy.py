"""What rounding weights to 8 bits costs: perplexity, and KL divergence from the float32 model, on a text.

Compared are our own weights of 8 bits, both ways they are multiplied (a prompt's many rows in float32, a step's few rows by
torch's kernel in bfloat16), and, where it is installed, CTranslate2's int8, which rounds activations as well.
"""

import argparse
import copy
import json
import lzma
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

import hf_variants
from hf_variants.conversion.engines import export_to_engine
from hf_variants.fast.int8 import MOST_ROWS
from hf_variants.text_generation import open_checkpoint


def read(path: Path) -> str:
    return (lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")).read()


def at_once(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all positions, as a prompt is computed: (rows, length, vocabulary)."""
    return torch.cat([model(row.unsqueeze(0), use_cache=False).logits for row in ids]).log_softmax(-1)


def step_by_step(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The same, as decoding computes them: one position of all rows at a time."""
    cache, logits = None, []
    for position in range(ids.shape[1]):
        output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1).log_softmax(-1)


def ctranslate2_int8(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The same, by CTranslate2, which rounds the same weights while it loads them."""
    import ctranslate2
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "ours")
        export_to_engine(Path(folder) / "ours", Path(folder) / "model", "ctranslate2")
        engine = ctranslate2.Generator(str(Path(folder) / "model"), compute_type="int8_float32", intra_threads=1)
        outputs = [np.array(engine.forward_batch([row], return_log_probs=True)) for row in ids.tolist()]
    return torch.from_numpy(np.concatenate(outputs))


def compare(log_p: torch.Tensor, reference: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """Perplexity, KL(reference || log_p) in nats on average and at its largest, and how often both have one favourite."""
    kl = (reference.exp() * (reference - log_p)).sum(-1)
    return {
        "perplexity": F.nll_loss(log_p[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item(),
        "kl_mean": kl.mean().item(),
        "kl_largest": kl.max().item(),
        "same_favourite": (log_p.argmax(-1) == reference.argmax(-1)).float().mean().item(),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint with its tokenizer: folder, GGUF file or Hub id")
    parser.add_argument("--text", required=True, type=Path, help="a text file, which may be .xz")
    parser.add_argument("--begin", help="the words in the text from which to take tokens")
    parser.add_argument(
        "--length", type=int, default=192, help="tokens of each of the rows that are computed together"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write; those in results/ are in docs/speed.md")
    arguments = parser.parse_args()

    opened = open_checkpoint(arguments.model, dtype=torch.float32, device="cpu")
    text = read(arguments.text)
    text = text[text.index(arguments.begin) if arguments.begin else 0 :]
    # As many rows as the kernel takes.
    count = MOST_ROWS * arguments.length
    tokens = opened.tokenizer(text[: 12 * count], return_tensors="pt")["input_ids"][0, :count]
    ids = tokens.view(MOST_ROWS, arguments.length)
    model = opened.model
    reference = at_once(model, ids)
    results = {"float32": compare(reference, reference, ids)}
    try:
        results["CTranslate2 int8"] = compare(ctranslate2_int8(model, ids), reference, ids)
    except (ImportError, ValueError) as error:
        print(f"CTranslate2: {error}")
    rounded = hf_variants.quantize_int8(copy.deepcopy(model))
    results["int8, a prompt"] = compare(at_once(rounded, ids), reference, ids)
    results["int8, step by step"] = compare(step_by_step(rounded, ids), reference, ids)
    sizes = [sum(p.nbytes for p in m.parameters()) for m in (model, rounded)]
    for name, result in results.items():
        print(name, {key: float(f"{value:.4g}") for key, value in result.items()})
    print(f"{sizes[1] / sizes[0]:.3f} of the bytes")
    if arguments.output:
        report = {
            "kind": "int8 accuracy",
            "model": Path(arguments.model).stem,
            "text": arguments.text.name,
            "tokens": count,
            "packages": {name: version(name) for name in ("torch", "transformers", "ctranslate2", "hf-variants")},
            "bytes": {"float32": sizes[0], "int8": sizes[1]},
            "results": results,
        }
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

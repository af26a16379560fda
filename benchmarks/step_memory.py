"""The most memory of a training step of stock classes on a CPU, beside what `hf-variants cost` says of their configs.

Each row is measured three times, each time in a process of its own, in its second step, when the optimizer has its states:

- what the allocator of torch gave out: torch.profiler's events of memory, added up in the order of time, on top of the
  weights and states that are there before the step. This is what `cost` counts, whatever Python and its libraries hold.
- what the process was resident in: the highest value of the whole process less that before the model was made; once as the C
  library allocates, and once with MALLOC_MMAP_THRESHOLD_=65536, so that glibc gives freed blocks back.

A step is forward, loss, backward, AdamW (a loop over tensors, as torch does on a CPU), on random tokens without padding;
gradients are set to None after it, and the logits are let go of before the backward, as Trainer does both.
"""

# Only what is light is imported here: the processes that measure import this file.
import argparse
import json
import multiprocessing
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parent))

from decoding import command, machine
from resident import most_resident
from shapes import SHAPES


# Real sizes, with random weights.
CONFIGS: dict[str, tuple[str, str, dict]] = {
    "SmolLM2-135M": SHAPES["llama-135m"],
    "BERT-base": ("BertForMaskedLM", "BertConfig", {}),
    "T5-small": (
        "T5ForConditionalGeneration", "T5Config",
        {"num_decoder_layers": 6, "decoder_start_token_id": 0, "tie_word_embeddings": True},
    ),
}  # fmt: skip
# Shape, batch, length, dtype, attention, whether layers are checkpointed.
ROWS = [
    ("SmolLM2-135M", 1, 512, "float32", "eager", False),
    ("SmolLM2-135M", 1, 512, "float32", "sdpa", False),
    ("SmolLM2-135M", 1, 512, "float32", "eager", True),
    ("SmolLM2-135M", 1, 512, "bfloat16", "eager", False),
    ("BERT-base", 4, 128, "float32", "eager", False),
    ("BERT-base", 16, 128, "float32", "eager", False),
    ("T5-small", 4, 128, "float32", "eager", False),
]


def steps(
    shape: str, batch: int, length: int, dtype: str, attention: str, checkpointing: bool
) -> tuple[Any, Any, Any]:
    """The model, its optimizer and what makes one step."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    class_name, config_name, fields = CONFIGS[shape]
    config = getattr(transformers, config_name)(**fields, architectures=[class_name])
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).to(getattr(torch, dtype)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(1, config.vocab_size, (batch, length))
    options = {} if config.is_encoder_decoder or class_name.startswith("Bert") else {"use_cache": False}

    def step() -> None:
        model(input_ids=ids, labels=ids, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def allocated(*row: Any) -> int:
    """Bytes that torch's allocator had given out at most."""
    from torch.profiler import ProfilerActivity, profile

    model, optimizer, step = steps(*row)
    step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *states))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return held + most


def resident(*row: Any) -> int:
    """Bytes that the process was resident in at most, beyond those before there was a model."""
    # A first product and its backward load what the first step would.
    import torch
    import transformers

    getattr(transformers, CONFIGS[row[0]][0])
    (torch.ones(8, 8, requires_grad=True) @ torch.ones(8, 8)).sum().backward()
    before = most_resident()
    _, _, step = steps(*row)
    step()
    step()
    return most_resident() - before


def said(shape: str, batch: int, length: int, dtype: str, attention: str, checkpointing: bool) -> dict[str, Any]:
    """What `cost` says of the config alone."""
    import transformers

    from hf_variants.cost import Plan, cost

    class_name, config_name, fields = CONFIGS[shape]
    config = getattr(transformers, config_name)(**fields, architectures=[class_name])
    found = cost(config, batch=batch, length=length, dtype=dtype, plan=Plan(checkpointing=checkpointing))
    step = found.eager_step if attention == "eager" else found.fused_step
    kept = found.eager_activations if attention == "eager" else found.fused_activations
    # All that there is in a step, as if it were there at once.
    at_once = found.memory[0].total + (kept.checkpointed if checkpointing else kept.total)
    return {"step": step.total, "moment": step.moment, "at_once": at_once}


def _in_process(function: Any, row: tuple, **environment: str) -> Any:
    os.environ.update(environment)
    try:
        return _in_fresh_process(function, row)
    finally:
        for name in environment:
            del os.environ[name]


def _in_fresh_process(function: Any, row: tuple) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, row)


def table(report: dict[str, Any]) -> str:
    """As docs/cost.md has it, in MiB."""
    lines = ["| step | said | allocated | said / allocated | resident | resident by default | all at once / allocated |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in report["rows"]:
        name = f"{row['shape']}, {row['batch']} × {row['length']}, {row['dtype']}, {row['attention']}"
        said, measured = row["said"], row["measured"]
        sizes = (said["step"], measured["allocated"], measured["resident"], measured["resident_by_default"])
        step, allocated, resident, by_default = (f"{size / 2**20:,.1f}" for size in sizes)
        lines.append(
            f"| {name}{', checkpointing' if row['checkpointing'] else ''} | {step} | {allocated} "
            f"| {said['step'] / measured['allocated']:.4f} | {resident} | {by_default} "
            f"| {said['at_once'] / measured['allocated']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=range(len(ROWS)), help="by number (default: all)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    rows = []
    for row in [ROWS[number] for number in arguments.rows]:
        found = _in_process(said, row)
        measured = {
            "allocated": _in_process(allocated, row),
            "resident": _in_process(resident, row, MALLOC_MMAP_THRESHOLD_="65536"),
            "resident_by_default": _in_process(resident, row),
        }
        names = ("shape", "batch", "length", "dtype", "attention", "checkpointing")
        rows.append(dict(zip(names, row)) | {"said": found, "measured": measured})
        print(f"{' '.join(map(str, row)):48} said {found['step'] / 2**20:8.1f} MiB ({found['moment']}), "
              f"allocated {measured['allocated'] / 2**20:8.1f} ({found['step'] / measured['allocated']:.4f}), "
              f"resident {measured['resident'] / 2**20:8.1f} ({found['step'] / measured['resident']:.3f}), "
              f"by default {measured['resident_by_default'] / 2**20:8.1f}, "
              f"at once {found['at_once'] / measured['allocated']:.3f}", flush=True)  # fmt: skip
    if arguments.output:
        report = {
            "kind": "step memory",
            "machine": machine(1, "torch", "transformers", "hf-variants"),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "command": command("step_memory.py"),
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

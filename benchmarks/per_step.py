"""Time per step of our model against the stock class with the same weights: generation, training, compiled decoding.

Both models are measured in one process, by turns, so that whatever else the machine does hits both. The result is a
table of ratios, ours / stock: below 1 we are faster. See README.md beside this file.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import hf_variants


def llama(width: int, layers: int, vocab_size: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=width, intermediate_size=8 * width // 3 // 64 * 64,
            num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=max(width // 128, 1),
        )
    )  # fmt: skip


def gemma2(width: int, layers: int, vocab_size: int) -> PreTrainedModel:
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=vocab_size, hidden_size=width, intermediate_size=8 * width // 3 // 64 * 64, head_dim=64,
            num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=max(width // 128, 1),
            sliding_window=128,
        )
    )  # fmt: skip


def gpt2(width: int, layers: int, vocab_size: int) -> PreTrainedModel:
    # Without dropout: the two would draw different numbers.
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size, n_embd=width, n_layer=layers, n_head=width // 64, embd_pdrop=0.0, attn_pdrop=0.0,
            resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


FAMILIES = {"llama": llama, "gemma2": gemma2, "gpt2": gpt2}
BACKENDS = ("eager", "sdpa")
# Where others share the processor, what this process was given says more than what the wall clock counted.
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(ours: Callable, stock: Callable, arguments: argparse.Namespace) -> dict:
    """Medians of both in seconds, and quartiles of the ratios of neighbouring runs; the first of each is a warm-up."""
    device, clock = torch.device(arguments.device), CLOCKS[arguments.clock]
    times: dict[str, list[float]] = {"stock": [], "ours": []}
    for _ in range(arguments.repeats + 1):
        for name, run in (("stock", stock), ("ours", ours)):
            synchronise(device)
            start = clock()
            run()
            synchronise(device)
            times[name].append(clock() - start)
    ours_s, stock_s = times["ours"][1:], times["stock"][1:]
    quartiles = statistics.quantiles([a / b for a, b in zip(ours_s, stock_s, strict=True)], n=4)
    return {
        "ours_s": statistics.median(ours_s),
        "stock_s": statistics.median(stock_s),
        "ratio": statistics.median(ours_s) / statistics.median(stock_s),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
    }


def generation(model: PreTrainedModel, tokens: torch.Tensor, new_tokens: int, **options) -> Callable:
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, **options}

    def run():
        model.eval()
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

    return run


def training(model: PreTrainedModel, tokens: torch.Tensor) -> Callable:
    """Forward, backward and AdamW, with a learning rate that leaves the weights alone."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)

    def run():
        model.train()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return run


def bytes_read_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights that one decoding step reads: all, less an embedding table of which it reads one row."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    return size - (0 if embedding is model.get_output_embeddings().weight else embedding.nbytes)


def compiled_decoding(
    ours: PreTrainedModel, stock: PreTrainedModel, tokens: torch.Tensor, arguments: argparse.Namespace
) -> dict:
    """Decoding with a static cache and transformers' own compilation; graphs and recompilations are counted."""
    options = {"cache_implementation": "static"}
    runs, graphs = [], []
    for model in (ours, stock):
        torch._dynamo.reset()
        counters.clear()
        if tokens.device.type != "cuda":
            options["compile_config"] = CompileConfig()
            options["compile_config"]._compile_all_devices = True
        run = generation(model, tokens, arguments.new_tokens, **options)
        for _ in range(2):
            run()
        graphs.append(counters["stats"]["unique_graphs"])
        runs.append(run)
    counters.clear()
    # The last reset threw away what the first model had compiled.
    runs[0]()
    counters.clear()
    result = alternate(*runs, arguments)
    per_token = result["ours_s"] / arguments.new_tokens
    result |= {"graphs": dict(zip(("ours", "stock"), graphs, strict=True))}
    result |= {"recompilations_while_timed": counters["stats"]["unique_graphs"]}
    result |= {"tokens_per_second": tokens.shape[0] / per_token}
    if arguments.bandwidth:
        result["fraction_of_bandwidth"] = bytes_read_per_token(ours) / per_token / (arguments.bandwidth * 1e9)
    return result


def measure(family: str, arguments: argparse.Namespace) -> list[dict]:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    stock = FAMILIES[family](arguments.width, arguments.layers, arguments.vocab_size).to(dtype)
    ours = hf_variants.from_native(stock).to(device)
    stock = stock.to(device)
    tokens = torch.randint(1, arguments.vocab_size, (arguments.batch, arguments.prompt), device=device)
    rows = []

    def add(step: str, backend: str, result: dict) -> None:
        rows.append({"family": family, "step": step, "attention": backend, **result})
        print(f"{family:8} {step:22} {backend:6} {result['stock_s'] * 1e3:10.1f} {result['ours_s'] * 1e3:10.1f} "
              f"{result['ratio']:7.3f}  {result['ratio_quartiles'][0]:.3f}-{result['ratio_quartiles'][1]:.3f}",
              flush=True)  # fmt: skip

    for backend in BACKENDS:
        if backend == "sdpa" and ours.config.unsupported_attention_features("sdpa"):
            continue
        for model in (ours, stock):
            model.set_attn_implementation(backend)
            model.eval()
        with torch.no_grad():
            out, expected = ours(tokens).logits.float(), stock(tokens).logits.float()
        difference = ((out - expected).abs().max() / expected.std()).item()
        if difference > (1e-4 if dtype == torch.float32 else 0.1):
            raise RuntimeError(f"{family} differs from the stock class by {difference:.1e} with {backend} attention.")
        both = [generation(model, tokens, arguments.new_tokens) for model in (ours, stock)]
        add(f"generate {arguments.new_tokens}", backend, alternate(*both, arguments))
        batch = tokens.expand(arguments.training_batch, -1)
        both = [training(model, batch) for model in (ours, stock)]
        add(f"train {tuple(batch.shape)}", backend, alternate(*both, arguments))
        if arguments.compile:
            add("static + compile", backend, compiled_decoding(ours, stock, tokens, arguments))
    return rows


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()


def main() -> None:
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_cuda else "float32")
    parser.add_argument("--width", type=int, default=2048 if on_cuda else 512)
    parser.add_argument("--layers", type=int, default=24 if on_cuda else 8)
    parser.add_argument("--vocab-size", type=int, default=32000 if on_cuda else 8192)
    parser.add_argument("--batch", type=int, default=1, help="sequences that are generated side by side")
    parser.add_argument("--training-batch", type=int, default=8 if on_cuda else 2)
    parser.add_argument("--prompt", type=int, default=128 if on_cuda else 64, help="tokens per sequence")
    parser.add_argument("--new-tokens", type=int, default=128 if on_cuda else 32)
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each model")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: time on the processor only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_cuda)
    parser.add_argument("--bandwidth", type=float, help="the device's memory bandwidth in GB/s")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.clock == "process" and arguments.device != "cpu":
        parser.error("--clock process does not see the accelerator's time. Leave it out, or use --device cpu.")
    if arguments.repeats < 7:
        parser.error("--repeats is below 7, too few for a median that means something. Give at least 7.")
    torch.set_num_threads(arguments.threads)

    print(f"{'family':8} {'step':22} {'attn':6} {'stock ms':>10} {'ours ms':>10} {'ratio':>7}  quartiles")
    rows = [row for family in arguments.families for row in measure(family, arguments)]
    if arguments.output:
        settings = {key: value for key, value in vars(arguments).items() if key != "output"}
        machine = {"device": device_name(arguments.device), "torch": torch.__version__,
                   "transformers": transformers.__version__, "hf_variants": hf_variants.__version__}  # fmt: skip
        report = {"machine": machine, "settings": settings, "rows": rows}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

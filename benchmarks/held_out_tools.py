"""What other packages say of models, as JSON: run by held_out.py in an environment that has them, without this package.

python held_out_tools.py FOLDER      # of folders with a config.json each; the stock classes are built from them
"""

import contextlib
import copy
import importlib.metadata
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers


# (batch, tokens) of a forward; tokens of an encoder-decoder's source and target are as many.
BATCH, LENGTH = 1, 96
PACKAGES = ("calflops", "ptflops", "fvcore", "hf-mem", "accelerate", "deepspeed", "torch", "transformers")


def inputs(config: Any) -> dict[str, torch.Tensor]:
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}


def without_cache(config: Any) -> dict[str, Any]:
    return inputs(config) | ({} if config.model_type == "bert" else {"use_cache": False})


def calflops(model: Any, folder: Path) -> dict[str, Any]:
    from calflops import calculate_flops

    # It moves every argument to a device, which True and False cannot be.
    flops, _, parameters = calculate_flops(
        model, kwargs=inputs(model.config), print_results=False, output_as_string=False
    )
    return {"flops": int(flops), "parameters": int(parameters)}


def ptflops(model: Any, folder: Path) -> dict[str, Any]:
    from ptflops import get_model_complexity_info

    given = without_cache(model.config)
    multiplied, parameters = get_model_complexity_info(
        model, (LENGTH,), input_constructor=lambda _: given, as_strings=False, print_per_layer_stat=False,
        backend="aten",
    )  # fmt: skip
    # It counts a multiplication and an addition as one.
    return {"flops": 2 * int(multiplied), "parameters": int(parameters)}


def fvcore(model: Any, folder: Path) -> dict[str, Any]:
    from fvcore.nn import FlopCountAnalysis, parameter_count

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> Any:
            given = without_cache(model.config)
            return self.model(**given | dict(zip(inputs(model.config), tensors)), return_dict=False)[0]

    counted = FlopCountAnalysis(Positional(), tuple(inputs(model.config).values()))
    counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return {"flops": 2 * int(counted.total()), "parameters": parameter_count(model)[""]}


def hf_mem(model: Any, folder: Path) -> dict[str, Any]:
    """Its function for the cache, which its command calls; parameters it reads from a checkpoint's header."""
    from hf_mem.safetensors.kv_cache import compute_safetensors_kv_cache_size

    config = json.loads((folder / "config.json").read_text())
    return {"cache": compute_safetensors_kv_cache_size(config, "F32", max_model_len=LENGTH, batch_size=BATCH)}


def accelerate(model: Any, folder: Path) -> dict[str, Any]:
    """As `accelerate estimate-memory` counts, which asks the Hub for the config: of a folder, from there on."""
    from accelerate.commands import estimate

    found: Any = type("Found", (), {"config": {}, "library_name": "transformers"})()
    with contextlib.redirect_stdout(io.StringIO()), _replaced(estimate, "verify_on_hub", lambda *_: found):
        built = estimate.create_empty_model(str(folder), "transformers")
    size, _ = estimate.calculate_maximum_sizes(built)
    training = estimate.estimate_training_usage(size, "float32")
    return {"weights": int(size), "parameters": int(size) // 4, "training": int(training["step"])}


def deepspeed(model: Any, folder: Path) -> dict[str, Any]:
    """What its estimators print for two devices without offloading, in bytes."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    parameters = stage_1_and_2.model_to_params(model)
    devices = {"num_gpus_per_node": 2, "num_nodes": 1, "cpu_offload": False}
    _, zero2 = stage_1_and_2.estimate_zero2_model_states_mem_needs(parameters, **devices)
    total, largest = stage3.model_to_params(model)
    _, zero3, _ = stage3.estimate_zero3_model_states_mem_needs(total, largest, cpu_offload_params=False, **devices)
    return {"parameters": parameters, "zero": {"2": zero2, "3": zero3}}


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Any:
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def proof(model: Any) -> dict[str, Any]:
    """What the built model has and does: its parameters, FlopCounterMode on eager attention, and its cache's own bytes."""
    from torch.utils.flop_counter import FlopCounterMode

    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(**without_cache(model.config))
    found: dict[str, Any] = {"parameters": model.num_parameters(), "flops": counted.get_total_flops()}
    if model.config.model_type != "bert":
        with torch.no_grad():
            cache = model(**inputs(model.config), use_cache=True).past_key_values
        halves = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
        layers = [layer for half in halves if half for layer in half.layers] or cache.layers
        found["cache"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)
    return found


TOOLS: dict[str, Callable[[Any, Path], dict[str, Any]]] = {
    "calflops": calflops, "ptflops": ptflops, "fvcore": fvcore, "hf-mem": hf_mem, "accelerate": accelerate,
    "deepspeed": deepspeed,
}  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    result: dict[str, Any] = {
        "batch": BATCH, "length": LENGTH, "configs": {},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }  # fmt: skip
    for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
        config = transformers.AutoConfig.from_pretrained(folder)
        found = result["configs"][folder.name] = {"tools": {}}
        model_class = getattr(transformers, config.architectures[0])
        # The default first, where the class has it.
        for attention in ("sdpa", "eager")[0 if model_class._supports_sdpa else 1 :]:
            config._attn_implementation = attention
            torch.manual_seed(0)
            model = model_class(config).eval()
            found.setdefault("built", proof(model))
            for name, tool in TOOLS.items():
                if name == "hf-mem" and "cache" not in found["built"]:
                    continue
                # What packages print is not theirs to say here.
                with contextlib.redirect_stdout(io.StringIO()):
                    try:
                        said = tool(model, folder)
                    except Exception as error:
                        said = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
                found["tools"].setdefault(name, {})[attention] = said
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()

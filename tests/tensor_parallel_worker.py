"""Compares tensor-parallel models with their unsharded selves; run by `torch.distributed.run`, see its caller."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_variants import VariantForCausalLM


def relative_error(value: torch.Tensor, expected: torch.Tensor, noise: float = 0.0) -> float:
    """Largest difference in standard deviations, of no less than `noise`: some gradients are zero but for rounding."""
    scale = (expected.std() if expected.numel() > 1 else expected.abs()).clamp(min=noise)
    return ((value - expected).abs().max() / scale).item()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tokens = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        whole = VariantForCausalLM.from_pretrained(folder, attn_implementation="eager")
        sharded = VariantForCausalLM.from_pretrained(
            folder, attn_implementation="eager", distributed_config=DistributedConfig(tp_plan="auto", tp_size=2)
        )
        with torch.no_grad():
            error = relative_error(sharded(tokens).logits, whole(tokens).logits)
        assert error < 1e-4, (folder, error)
        whole(tokens, labels=tokens).loss.backward()
        sharded(tokens, labels=tokens).loss.backward()
        expected = dict(whole.named_parameters())
        noise = 1e-3 * max(parameter.grad.std().item() for parameter in expected.values() if parameter.numel() > 1)
        for name, parameter in sharded.named_parameters():
            gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            error = relative_error(gradient, expected[name].grad, noise)
            assert error < 1e-3, (folder, name, error)
        if dist.get_rank() == 0:
            print("equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Norms: their weights put into the matrices behind them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..conversion.folds import is_zero_centered
from ..model.configuration_variant import VariantConfig
from ..model.normalization import unchanged
from .operation import Operation
from .subject import SAME_FUNCTION, Outcome, Subject, SurgeryError
from .ties import HEAD, Untie


# A sublayer -> what reads its normalised input.
READERS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "g_proj"),
    "cross_attn": ("q_proj", "g_proj"),
    "mlp": ("up_proj", "gate_proj"),
}


@dataclass(frozen=True)
class FuseNorms(Operation):
    """
    The weight of every norm before a sublayer goes into the matrices that read it, and that of the last norm into the LM
    head, which is untied for it. The norms' own weights become ones (or zeros, where 1 is added).
    """

    def apply(self, subject: Subject) -> Subject:
        if _has_plain_head(subject) and subject.config.tie_word_embeddings:
            subject = Untie().apply(subject)
        fused: dict[str, list[str]] = {}
        for stack, config in subject.stacks.items():
            _refuse(config)
            prefix = subject.prefix(stack)
            for number, block in enumerate(subject.blocks(stack)):
                for norm, readers in in_block(block):
                    fused[f"{prefix}layers.{number}.{norm}"] = [
                        f"{prefix}layers.{number}.{reader}" for reader in readers
                    ]
            if _has_plain_head(subject) and config.final_norm and stack != "encoder":
                fused[f"{prefix}norm"] = ["lm_head"]
        modules = dict(subject.skeleton.named_modules())
        fused = {
            norm: readers for norm, readers in fused.items() if getattr(modules[norm], "weight", None) is not None
        }
        if biased := [norm for norm in fused if getattr(modules[norm], "bias", None) is not None]:
            raise SurgeryError(
                f"{biased[0]} has a bias, which no matrix takes up. Fuse norms of models without (`norm_bias`)."
            )
        norm_of = {reader: norm for norm, readers in fused.items() for reader in readers}
        if not fused:
            raise SurgeryError("No norm with a weight stands before a sublayer. Leave `--fuse-norms` out.")

        def tensor(name: str, before: Subject) -> torch.Tensor:
            owner, _, leaf = name.rpartition(".")
            old = before.load(name)
            if owner in fused and leaf == "weight":
                return torch.full_like(old, 0.0 if is_zero_centered(modules[owner]) else 1.0)
            if owner in norm_of and leaf == "weight":
                norm = norm_of[owner]
                weight = before.load(f"{norm}.weight").double() + (1.0 if is_zero_centered(modules[norm]) else 0.0)
                return (old.double() * weight).to(old.dtype)
            return old

        return subject.changed(
            Outcome(f"{len(fused)} norm weights fused into the matrices behind them", SAME_FUNCTION), tensor
        )


def _has_plain_head(subject: Subject) -> bool:
    """Whether the LM head is a matrix that reads the last norm's output and nothing else."""
    last = list(subject.stacks.values())[-1]
    between = (last.lm_head_transform, last.output_projection, last.lm_head_normalized)
    return HEAD in subject.skeleton.state_dict() and not any(between)


def _refuse(config: VariantConfig) -> None:
    for layer in config.per_layer_config:
        if layer.norm_placement not in ("pre", "sandwich") or layer.residual_from_norm:
            raise SurgeryError(
                "The norms' output is more than a sublayer's input (`norm_placement` or `residual_from_norm`), so that "
                "their weights cannot move. Fuse norms of models with `norm_placement` pre or sandwich."
            )


def in_block(block: Any) -> list[tuple[str, list[str]]]:
    """Names of a block's norms, each with the matrices that read it."""
    found: list[tuple[str, list[str]]] = []
    shared = getattr(block, "shared_norm", False)
    for name in READERS:
        sublayer, norm = getattr(block, name, None), getattr(block, f"{name}_pre_norm", unchanged)
        if sublayer is None or not isinstance(norm, nn.Module):
            continue
        others = [n for n in READERS if n != name and shared and getattr(block, n, None) is not None]
        matrices = [f"{n}.{reader}" for n in (name, *others) for reader in READERS[n]]
        found.append((f"{name}_pre_norm", [path for path in matrices if _has(block, path)]))
    return found


def _has(block: Any, path: str) -> bool:
    owner, _, leaf = path.partition(".")
    return hasattr(getattr(block, owner), leaf)

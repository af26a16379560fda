"""Norms: their weights put into the matrices behind them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..conversion.folds import is_zero_centered
from ..model.configuration_variant import VariantConfig
from ..model.normalization import unchanged
from .operation import Operation
from .subject import SAME_FUNCTION, Outcome, Subject, SurgeryError, with_stacks
from .ties import HEAD, Untie


FINAL = "norm"
# A sublayer -> what reads its normalised input.
READERS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "g_proj"),
    "cross_attn": ("q_proj", "g_proj"),
    "mlp": ("up_proj", "gate_proj"),
}


@dataclass(frozen=True)
class FuseNorms(Operation):
    """
    The weight of every norm before a sublayer goes into the matrices that read it, and its bias into theirs; those of the
    last norm into the LM head, which is untied for it, and an encoder's into the cross-attention. The norms' own weights
    become ones (or zeros, where 1 is added), their biases zeros.
    """

    def apply(self, subject: Subject) -> Subject:
        if _has_plain_head(subject) and subject.config.tie_word_embeddings:
            subject = Untie().apply(subject)
        modules = dict(subject.skeleton.named_modules())
        fused: dict[str, list[str]] = {}
        for stack, config in subject.stacks.items():
            _refuse(config)
            prefix = subject.prefix(stack)
            for number, block in enumerate(subject.blocks(stack)):
                for norm, readers in in_block(block):
                    fused[f"{prefix}layers.{number}.{norm}"] = [
                        f"{prefix}layers.{number}.{reader}" for reader in readers
                    ]
            if stack == "encoder":
                fused[f"{prefix}{FINAL}"] = of_encoder(subject)
            elif _has_plain_head(subject):
                fused[f"{prefix}{FINAL}"] = ["lm_head"]
        fused = {
            norm: readers
            for norm, readers in fused.items()
            if readers and getattr(modules.get(norm), "weight", None) is not None
        }
        norm_of = {reader: norm for norm, readers in fused.items() for reader in readers}
        if not fused:
            raise SurgeryError(
                "No norm with a weight stands before a sublayer (`norm_affine`). Leave `--fuse-norms` out."
            )
        biased = {norm for norm in fused if getattr(modules[norm], "bias", None) is not None}
        bias_of = {reader: norm for reader, norm in norm_of.items() if norm in biased}
        changed = with_stacks(subject.config, with_biases(subject, bias_of)) if biased else subject.config

        def tensor(name: str, before: Subject) -> torch.Tensor:
            owner, _, leaf = name.rpartition(".")
            if leaf == "bias" and owner in bias_of:
                return with_bias(before, owner, bias_of[owner])
            if name not in before.stored and leaf == "bias" and biased:
                return no_bias(before, owner)
            old = before.load(name)
            if owner in fused and leaf in ("weight", "bias"):
                neutral = 0.0 if leaf == "bias" or is_zero_centered(modules[owner]) else 1.0
                return torch.full_like(old, neutral)
            if owner in norm_of and leaf == "weight":
                norm = norm_of[owner]
                weight = before.load(f"{norm}.weight").double() + (1.0 if is_zero_centered(modules[norm]) else 0.0)
                return (old.double() * weight).to(old.dtype)
            return old

        what = f"{len(fused)} norm weights{' and biases' if biased else ''} fused into the matrices behind them"
        after = subject.changed(Outcome(what, SAME_FUNCTION), tensor, config=changed)
        refuse_lost_bias(after, bias_of)
        return after


def of_encoder(subject: Subject) -> list[str]:
    """What reads an encoder's last norm."""
    prefix = subject.prefix("decoder")
    return [
        f"{prefix}layers.{number}.cross_attn.{reader}"
        for number, block in enumerate(subject.blocks("decoder"))
        if getattr(block, "cross_attn", None) is not None
        for reader in ("k_proj", "v_proj")
    ]


def with_biases(subject: Subject, norm_of: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The fields with which these readers of norms have a bias, by stack."""
    changes: dict[str, dict[str, Any]] = {}
    for stack in subject.stacks:
        prefix = f"{subject.prefix(stack)}layers."
        inner = [reader.removeprefix(prefix).split(".")[1] for reader in norm_of if reader.startswith(prefix)]
        changes[stack] = {"attention_bias": True} if any(name.endswith("attn") for name in inner) else {}
        changes[stack] |= {"mlp_bias": True} if "mlp" in inner else {}
    if "lm_head" in norm_of:
        changes[list(subject.stacks)[-1]]["lm_head_bias"] = True
    return changes


def refuse_lost_bias(after: Subject, norm_of: dict[str, str]) -> None:
    """Refuse a norm's bias of which a reader takes none."""
    lost = next((reader for reader in norm_of if f"{reader}.bias" not in after.stored), None)
    if lost is not None:
        raise SurgeryError(
            f"The bias of {norm_of[lost]} has nowhere to go: {lost} has none (`norm_bias`). Leave the operation out."
        )


def with_bias(before: Subject, reader: str, norm: str) -> torch.Tensor:
    """The reader's bias, with what the norm's adds to its output."""
    weight = before.load(f"{reader}.weight")
    added = weight.double() @ before.load(f"{norm}.bias").double() if not weight.is_meta else weight[:, 0]
    own = before.load(f"{reader}.bias") if f"{reader}.bias" in before.stored else torch.zeros_like(added)
    return (own.double() + added).to(weight.dtype)


def no_bias(before: Subject, owner: str) -> torch.Tensor:
    """A bias that the config now has and no norm fills."""
    weight = before.load(f"{owner}.weight")
    return weight.new_zeros(weight.shape[0])


def _has_plain_head(subject: Subject) -> bool:
    """Whether the LM head is a matrix that reads the last norm's output and nothing else."""
    last = list(subject.stacks.values())[-1]
    between = (last.lm_head_transform, last.output_projection, last.lm_head_normalized)
    return HEAD in subject.skeleton.state_dict() and not any(between)


def _refuse(config: VariantConfig) -> None:
    for layer in config.per_layer_config:
        if layer.norm_placement not in ("pre", "sandwich", "branch") or layer.residual_from_norm:
            raise SurgeryError(
                "The norms' output is more than a sublayer's input (`norm_placement` or `residual_from_norm`), so that "
                "their weights cannot move. Fuse norms of models with `norm_placement` pre, sandwich or branch."
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

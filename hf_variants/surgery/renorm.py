"""Other norms: LayerNorm as RMSNorm, and norms and scales that a model does not have, with the least change."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..conversion.folds import is_zero_centered
from .norms import FINAL, in_block, no_bias, of_encoder, refuse_lost_bias, with_bias
from .observed import mean_squares
from .operation import Operation
from .subject import APPROXIMATE, SAME_BITS, SAME_FUNCTION, Outcome, Subject, SurgeryError, with_stacks
from .ties import HEAD, Untie
from .width import body_prefix


SUBLAYERS = ("self_attn", "cross_attn", "mlp")
OUTPUTS = ("o_proj", "down_proj")
TABLE = re.compile(r"(embed_tokens|embed_positions|token_types|task_types)\.weight")
WRITER = re.compile(
    rf"layers\.\d+\.({'|'.join(SUBLAYERS)})\.({'|'.join(OUTPUTS)})\.(weight|bias)|(token|embedding)_projection\..*"
)


@dataclass(frozen=True)
class ToRMSNorm(Operation):
    """
    LayerNorm as RMSNorm, which is the same where the mean is zero: whatever is added to the residual stream gives up its own
    mean (https://arxiv.org/abs/2305.14858), and a norm's bias goes into what reads it.
    """

    def apply(self, subject: Subject) -> Subject:
        for config in subject.stacks.values():
            self._refuse(config)
        if subject.config.tie_word_embeddings and HEAD in subject.skeleton.state_dict():
            # The embedding gives up its mean, and the head must not.
            subject = Untie().apply(subject)
        # Reader -> the norm before it, and the other way round, without what has no bias.
        norm_of: dict[str, str] = {}
        changes: dict[str, dict[str, Any]] = {}
        for stack, config in subject.stacks.items():
            prefix = subject.prefix(stack)
            changes[stack] = {
                "norm_type": "rmsnorm", "norm_bias": False, "norm_casting_mode": None, "qk_norm_type": config.qk_norm_type,
            }  # fmt: skip
            if not config.norm_bias:
                continue
            changes[stack] |= {"attention_bias": True, "mlp_bias": True}
            for number, block in enumerate(subject.blocks(stack)):
                for norm, readers in in_block(block):
                    norm_of |= {f"{prefix}layers.{number}.{r}": f"{prefix}layers.{number}.{norm}" for r in readers}
        config = subject.config
        if any(stack.norm_bias for stack in subject.stacks.values()):
            self._read_final_norms(subject, norm_of, changes)
        changed = with_stacks(config, changes)
        width = next(iter(subject.stacks.values())).hidden_size
        prefixes = [subject.prefix(stack) for stack in subject.stacks]

        def tensor(name: str, before: Subject) -> torch.Tensor:
            inner = next(
                (name.removeprefix(p) for p in sorted(prefixes, key=len, reverse=True) if name.startswith(p)), name
            )
            owner, _, leaf = name.rpartition(".")
            if leaf == "bias" and owner in norm_of:
                return with_bias(before, owner, norm_of[owner])
            if name not in before.stored:
                return no_bias(before, owner)
            old = before.load(name)
            if TABLE.search(inner):
                # What is projected to the stream first is no part of it.
                return _centred(old, -1) if old.shape[-1] == width else old
            return _centred(old, 0) if WRITER.fullmatch(inner) else old

        outcome = Outcome("LayerNorm is RMSNorm on a stream without a mean", SAME_FUNCTION)
        after = subject.changed(outcome, tensor, config=changed)
        refuse_lost_bias(after, norm_of)
        return after

    def _refuse(self, config: Any) -> None:
        wrong = {
            f"`norm_type` is {config.norm_type}": config.norm_type != "layernorm",
            "norms stand on the stream (`norm_placement`)": any(
                x.norm_placement != "pre" for x in config.per_layer_config
            ),
            "the embedding is normalised into the stream (`embedding_norm`)": config.embedding_norm,
            "the stream goes through no last norm (`final_norm`)": not config.final_norm,
            "branches join the normalised input (`residual_from_norm`)": any(
                x.residual_from_norm for x in config.per_layer_config
            ),
            "sublayers have norms inside (`ffn_sub_norm`, `attention_sub_norm`)": any(
                x.ffn_sub_norm or x.attention_sub_norm for x in config.per_layer_config
            ),
            "computed sinusoids have a mean (`position_embedding_type`)": config.position_embedding_type
            == "sinusoidal",
            "the head has a norm of its own (`lm_head_transform`)": config.lm_head_transform,
            "layers have a learned scale (`learned_scale_type`)": config.learned_scale_type == "channel",
        }
        for why, is_so in wrong.items():
            if is_so:
                raise SurgeryError(f"LayerNorm cannot become RMSNorm here, because {why}. Leave `--to-rmsnorm` out.")

    def _read_final_norms(self, subject: Subject, norm_of: dict[str, str], changes: dict[str, dict[str, Any]]) -> None:
        """What reads the last norms, whose biases must go somewhere."""
        if any(config.attention_gate != "none" for config in subject.stacks.values()):
            raise SurgeryError("A gate reads the norms without a bias (`attention_gate`). Leave `--to-rmsnorm` out.")
        last = list(subject.stacks)[-1]
        if len(subject.stacks) == 2:
            encoder = f"{subject.prefix('encoder')}{FINAL}"
            norm_of |= dict.fromkeys(of_encoder(subject), encoder)
        plain = not (subject.stacks[last].output_projection or subject.stacks[last].lm_head_normalized)
        if HEAD not in subject.skeleton.state_dict() or not plain:
            raise SurgeryError(
                "The last norm's bias has no matrix to go into: there is no plain LM head. Take a language model."
            )
        norm_of["lm_head"] = f"{subject.prefix(last)}{FINAL}"
        changes[last]["lm_head_bias"] = True


def _centred(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    exact = tensor.double()
    return (exact - exact.mean(dim, keepdim=True)).to(tensor.dtype)


@dataclass(frozen=True)
class AddNorms(Operation):
    """
    Norms that a model does not have, whose weights are the sizes that they find on a text, so that little changes.

    Args:
        kind: `"qk"`, an RMS norm on every head of queries and keys; or `"sandwich"`, one behind every branch.
        text: the text, or the path of a file with it.
    """

    kind: str
    text: str | Path | None = None

    def apply(self, subject: Subject) -> Subject:
        if self.kind not in ("qk", "sandwich"):
            raise SurgeryError(f"There are no norms {self.kind!r} to add. Give qk or sandwich.")
        if self.text is None:
            raise SurgeryError("The weights of new norms are measured on a text. Give one with `--text`.")
        changes: dict[str, dict[str, Any]] = {}
        # A new norm -> what it will stand behind, and the heads that it sees apart.
        sources: dict[str, tuple[str, int]] = {}
        for stack, config in subject.stacks.items():
            changes[stack] = self._fields(config)
            for number, (block, layer) in enumerate(zip(subject.blocks(stack), config.per_layer_config)):
                name = f"{subject.prefix(stack)}layers.{number}."
                for sublayer in SUBLAYERS:
                    module = getattr(block, sublayer, None)
                    if module is None or (self.kind == "qk" and sublayer == "mlp"):
                        continue
                    if self.kind == "sandwich":
                        output = next(output for output in OUTPUTS if hasattr(module, output))
                        sources[f"{name}{sublayer}_branch_norm"] = (f"{name}{sublayer}.{output}", 1)
                    else:
                        sources[f"{name}{sublayer}.q_norm"] = (f"{name}{sublayer}.q_proj", layer.num_attention_heads)
                        sources[f"{name}{sublayer}.k_norm"] = (f"{name}{sublayer}.k_proj", layer.num_key_value_heads)
        prefix = body_prefix(subject)
        watched = {source.removeprefix(prefix): "output" for source, _ in sources.values()}
        squares = mean_squares(subject, self.text, watched)

        def tensor(name: str, before: Subject) -> torch.Tensor:
            owner, _, leaf = name.rpartition(".")
            if owner not in sources:
                return before.load(name)
            shape, (source, heads) = after.stored[name].shape, sources[owner]
            like = before.load(f"{source}.weight")
            if leaf == "bias":
                return like.new_zeros(shape)
            size = squares[source.removeprefix(prefix)].view(heads, -1).mean(1).sqrt()
            size = size - (1.0 if is_zero_centered(after.skeleton.get_submodule(owner)) else 0.0)
            made = size[:, None].expand(heads, shape.numel() // heads).reshape(shape).to(like.dtype)
            return made.to("meta") if like.is_meta else made

        what = {"qk": "an RMS norm on every head of queries and keys", "sandwich": "a norm behind every branch"}[
            self.kind
        ]
        outcome = Outcome(f"{what}, of the sizes on the text", APPROXIMATE)
        after = subject.changed(outcome, tensor, config=with_stacks(subject.config, changes))
        return after

    def _fields(self, config: Any) -> dict[str, Any]:
        if self.kind == "qk":
            if config.qk_norm != "none":
                raise SurgeryError(
                    f"Queries and keys are normalised already (`qk_norm` {config.qk_norm}). Leave `--add-norms qk` out."
                )
            return {
                "qk_norm": "per_head", "qk_norm_type": "rmsnorm", "qk_norm_affine": True, "qk_norm_bias": False,
                "qk_norm_eps": config.norm_eps,
            }  # fmt: skip
        placements = {layer.norm_placement for layer in config.per_layer_config}
        if placements != {"pre"} or config.parallel_block != "none" or not config.norm_affine:
            raise SurgeryError(
                "Norms behind branches are added to blocks with norms before them (`norm_placement` pre, `parallel_block` "
                "none, `norm_affine`). Leave `--add-norms sandwich` out."
            )
        return {"norm_placement": "sandwich"}


@dataclass(frozen=True)
class AddLayerScale(Operation):
    """A learned scale for every channel of a branch (https://arxiv.org/abs/2103.17239), which changes nothing at first."""

    def apply(self, subject: Subject) -> Subject:
        start: dict[str, float] = {}
        for stack, config in subject.stacks.items():
            for number, layer in enumerate(config.per_layer_config):
                if layer.learned_scale_type != "none" or layer.norm_placement == "deepnorm":
                    field = "norm_placement" if layer.norm_placement == "deepnorm" else "learned_scale_type"
                    raise SurgeryError(
                        f"Layer {number} scales its branches already (`{field}`). Leave `--layer-scale` out."
                    )
                start[f"{subject.prefix(stack)}layers.{number}."] = float(layer.residual_multiplier)
        fields = {"learned_scale_type": "channel", "layer_scale_init": 1.0, "residual_multiplier": 1.0}
        exactness = SAME_BITS if set(start.values()) == {1.0} else SAME_FUNCTION
        dtype = subject.header_source(next(iter(subject.stored))).dtype

        def tensor(name: str, before: Subject) -> torch.Tensor:
            if not name.endswith("_residual.scale"):
                return before.load(name)
            value = next(value for layer, value in start.items() if name.startswith(layer))
            return torch.full(after.stored[name].shape, value, dtype=dtype)

        outcome = Outcome("a learned scale for every channel of every branch", exactness)
        after = subject.changed(
            outcome, tensor, config=with_stacks(subject.config, dict.fromkeys(subject.stacks, fields))
        )
        return after

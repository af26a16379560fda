"""What stands between the last hidden state and logits: pooling, transforms, scaling."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import is_tracing

from .axis import ROUNDING, TRAINING, Axis, Check, Idle, activation_check, axis, setting
from .part import CALLS, SHAPES, Call, states


@axis
class HeadAxis(Axis):
    """
    output_projection (`bool`): project back to `embedding_size` before the LM head (OPT-350m).
    logit_scale (`float`): multiplies the logits.
    final_logit_softcapping (`float`): logits become `c * tanh(logits / c)` (Gemma 2).
    lm_head_bias (`bool`): bias of the LM head.
    lm_head_normalized (`bool`): the rows of the LM head's weight are scaled to length 1 (Baichuan 2).
    lm_head_transform (`bool`): dense + activation + norm before the LM head (BERT), with
        `lm_head_transform_bias` and `lm_head_transform_act`.
    lm_head_unread_bias (`bool`): a second bias that is stored with the LM head and enters nothing (untied BERT).
    lm_head_input_scale (`float`): multiplies what enters the LM head (T5 with tied embeddings).

    Rounding:
    logit_scale_by_division (`bool`): divide the logits by `1 / logit_scale` (Granite).
    """

    title = "head"

    output_projection: bool = False
    logit_scale: int | float = 1.0
    final_logit_softcapping: int | float | None = None
    lm_head_bias: bool = False
    lm_head_normalized: bool = False
    lm_head_transform: bool = False
    lm_head_transform_bias: bool = True
    lm_head_transform_act: str | None = None
    lm_head_unread_bias: bool = False
    lm_head_input_scale: int | float = 1.0

    logit_scale_by_division: bool = setting(False, ROUNDING)

    def derive(self) -> None:
        if self.lm_head_transform_act is None:
            self.lm_head_transform_act = self.hidden_act

    def checks(self) -> list[Check]:
        act = activation_check("lm_head_transform_act", self.lm_head_transform_act)
        return [
            # Reported once where it is derived from the other.
            act._replace(broken=act.broken and self.lm_head_transform_act != self.hidden_act),
            Check(
                self.final_logit_softcapping is not None and self.final_logit_softcapping <= 0,
                f"`final_logit_softcapping` is {self.final_logit_softcapping}.",
                "Set it above 0, or to None for no cap.",
            ),
            Check(
                self.logit_scale_by_division and self.logit_scale == 0,
                "`logit_scale_by_division` is set, but `logit_scale` is 0.",
                "Set another `logit_scale`, or `logit_scale_by_division=False`.",
            ),
            Check(
                self.output_projection and self.embedding_size == self.hidden_size,
                "`output_projection` is set, but `embedding_size` equals `hidden_size`.",
                "Set `output_projection=False`, or another `embedding_size`.",
            ),
            Check(
                self.output_projection and self.lm_head_transform,
                "`output_projection` and `lm_head_transform` both stand before the LM head.",
                "Use one of the two.",
            ),
            Check(
                self.lm_head_transform and self.lm_head_input_scale != 1.0,
                "`lm_head_input_scale` and `lm_head_transform` both stand before the LM head.",
                "Use one of the two.",
            ),
            Check(
                self.lm_head_unread_bias and not self.lm_head_bias,
                "`lm_head_unread_bias` is set without `lm_head_bias`, the one that is read.",
                "Set both, or `lm_head_unread_bias=False`.",
            ),
        ]

    def idle(self) -> list[Idle]:
        # A power of two: both operations are exact.
        exact = math.frexp(self.logit_scale)[0] == 0.5
        return [
            Idle(not self.lm_head_transform, self.named("lm_head_transform_"), "`lm_head_transform` is off"),
            Idle(exact, ["logit_scale_by_division"], f"`logit_scale` is {self.logit_scale}, a power of two"),
        ]


@axis
class ClassifierAxis(Axis):
    """
    pooler (`bool`): dense + tanh on the first token, as an encoder's `pooler_output` (BERT); a decoder's first token sees
        only itself.
    pooler_scope (`str`): which models have it: `"every_head"`; `"base"`, the one without a head alone; `"classifier"`, the
        classifiers of sequences and of choices, which read it (Nomic BERT); `"base_and_classifier"` (BERT); or
        `"base_and_choices"` (RoBERTa).
    classifier_pooling (`str`): the vector a sequence classifier reads where there is no pooler: `"first"` (default
        of encoders), `"last"` real token (default of decoders), `"mean"` of the tokens that the mask shows,
        `"mean_in_float32"` (the same, rounded once where there is no mask; EuroBERT), `"mean_of_logits"` (every
        token is classified, and their logits are averaged in that way; EuroBERT's "late"), or `"end_of_sequence"`,
        the last `eos_token_id` (BART). In an encoder-decoder it is a vector of the decoder; `"last"` and
        `"end_of_sequence"` are looked for in the source, of which the decoder's inputs are made: `"last"` is where
        the source's last real token stands after their shift (T5Gemma).
    classifier_bias (`bool`): bias of the sequence classifier; default: in encoders only.
    classifier_transform (`bool`): dense + activation before the classifier (RoBERTa), with
        `classifier_transform_bias`, `classifier_transform_act`, `classifier_transform_norm` (a norm after them,
        ModernBERT) and `classifier_transform_on_tokens` (also in token classification and question answering).
    classifier_transform_dropout (`bool`): `classifier_dropout` applies before the transform, too (RoBERTa: yes,
        DistilBERT: no).
    choice_pooling (`str`): as `classifier_pooling`, which is its default, of the model that chooses among sequences; or
        `"first_real"`, the first token that the mask shows (ModernBERT), `"last_position"`, padding or not (RoFormer), or
        `"mean_of_positions"`, padding included.
    choice_transform (`bool`): dense + activation before that model's classifier, with `choice_transform_act` and
        `choice_transform_dropout`; each by default as the sequence classifier's, whose bias and norm it has.
    """

    title = "classifier"

    pooler: bool = False
    pooler_scope: Literal["every_head", "base", "classifier", "base_and_classifier", "base_and_choices"] = "every_head"
    classifier_pooling: (
        Literal["first", "last", "mean", "mean_in_float32", "mean_of_logits", "end_of_sequence"] | None
    ) = None
    classifier_bias: bool | None = None
    classifier_transform: bool = False
    classifier_transform_bias: bool = True
    classifier_transform_act: str = "tanh"
    classifier_transform_norm: bool = False
    classifier_transform_on_tokens: bool = False
    classifier_transform_dropout: bool = setting(True, TRAINING)
    choice_pooling: (
        Literal[
            "first", "last", "mean", "mean_in_float32", "mean_of_logits", "end_of_sequence", "first_real",
            "last_position", "mean_of_positions",
        ]
        | None
    ) = None  # fmt: skip
    choice_transform: bool | None = None
    choice_transform_act: str | None = None
    choice_transform_dropout: bool | None = setting(None, TRAINING)

    def derive(self) -> None:
        if self.classifier_pooling is None:
            self.classifier_pooling = "last" if self.is_causal else "first"
        if self.classifier_bias is None:
            self.classifier_bias = not self.is_causal
        for name in ("pooling", "transform", "transform_act", "transform_dropout"):
            if getattr(self, f"choice_{name}") is None:
                setattr(self, f"choice_{name}", getattr(self, f"classifier_{name}"))

    def checks(self) -> list[Check]:
        act = activation_check("classifier_transform_act", self.classifier_transform_act)
        of_choices = activation_check("choice_transform_act", self.choice_transform_act)
        return [
            # Reported once where one is derived from the other.
            act._replace(broken=act.broken and self.classifier_transform_act != self.hidden_act),
            of_choices._replace(
                broken=of_choices.broken
                and self.choice_transform_act not in (self.classifier_transform_act, self.hidden_act)
            ),
        ]

    def idle(self) -> list[Idle]:
        of_transform, of_choices = self.named("classifier_transform_"), self.named("choice_transform_")
        return [
            Idle(not self.pooler, ["pooler_scope"], "`pooler` is off"),
            Idle(not self.classifier_transform, of_transform, "`classifier_transform` is off"),
            Idle(not self.choice_transform, of_choices, "`choice_transform` is off"),
        ]

    def has_pooler(self, role: str) -> bool:
        """
        Whether the model without a head (`"base"`), a sequence `"classifier"`, one of `"choices"` or any `"other"` one has
        the pooler.
        """
        roles = ("classifier", role) if role == "choices" else (role,)
        scope = self.pooler_scope
        return self.pooler and (scope == "every_head" or any(role in scope.split("_and_") for role in roles))


class DenseTransform(nn.Module):
    """
    Dense layer, activation and norm in front of an LM head or a classifier (BERT, ModernBERT, RoBERTa).

    Args:
        dense (`nn.Linear`): from one width to the other.
        act_fn (`nn.Module`): the activation.
        norm (`Callable`): applied last; `unchanged` for none.
        dropout (`float`): probability of dropping an input of the dense layer.

    Shape: (..., input_size) -> (..., output_size).
    """

    def __init__(self, dense: nn.Linear, act_fn: nn.Module, norm: Callable, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.dense = dense
        self.act_fn = act_fn
        self.norm = norm

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act_fn(self.dense(self.dropout(hidden_states))))


class Pooler(nn.Module):
    """Dense layer and tanh on the first token (BERT): (batch, length, hidden_size) -> (batch, hidden_size)."""

    def __init__(self, dense: nn.Linear):
        super().__init__()
        self.dense = dense

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


@states(CALLS, Pooler)
def calls_in_pooler(call: Call, name: str, **_: Any) -> Call:
    return call.of_length(1)


class NormalizedLinear(nn.Linear):
    """A linear layer with rows of length 1, whatever the stored weight (Baichuan 2)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, F.normalize(self.weight), self.bias)


def unread_bias(size: int) -> nn.Parameter:
    """What is stored with an LM head and enters nothing: (size,)."""
    return nn.Parameter(torch.zeros(size))


@states(SHAPES, unread_bias)
def unread_bias_shapes(size: int) -> dict[str, tuple[int, ...]]:
    return {"": (size,)}


class InputScaling(nn.Module):
    """Multiplies what enters the LM head (T5: hidden_size ** -0.5 where the embeddings are tied)."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.scale


class LogitScaling(nn.Module):
    """
    logits * scale, then cap * tanh(logits / cap); either part is optional (Cohere, Gemma 2).

    Args:
        scale (`float`): 1 for none.
        softcap (`float`): the cap, or `None`.
        by_division (`bool`): divide by 1 / scale instead (Granite).
    """

    def __init__(self, scale: float, softcap: float | None, by_division: bool = False):
        super().__init__()
        self.scale_logits = partial(torch.div, other=1.0 / scale) if by_division else partial(torch.mul, other=scale)
        self.is_scaled = scale != 1.0
        self.softcap = softcap

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        if self.is_scaled:
            logits = self.scale_logits(logits)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def first_token(hidden_states: torch.Tensor, real_tokens: torch.Tensor | None) -> torch.Tensor:
    """(batch, length, width) -> (batch, width): the first token."""
    return hidden_states[:, 0]


def last_real_token(hidden_states: torch.Tensor, real_tokens: torch.Tensor) -> torch.Tensor:
    """(batch, length, width) -> (batch, width): the last token that is not padding, wherever the padding is."""
    indices = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    last = (indices * real_tokens).argmax(dim=-1)
    return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), last]


def ends_of_sequences(input_ids: torch.Tensor | None, eos_token_id: int | list[int] | None) -> torch.Tensor:
    """
    (batch, length) with 1 at every token that ends a sequence.

    Raises:
        ValueError: if there are no token ids, or a row without such a token. A graph being traced (`torch.compile`)
            cannot tell of the latter, and takes the first token.
    """
    if input_ids is None or eos_token_id is None:
        raise ValueError(
            "`classifier_pooling` is end_of_sequence, and without `input_ids` and an `eos_token_id` in the config no token "
            "is known to end a sequence. Give both."
        )
    ends = torch.isin(input_ids, torch.tensor(eos_token_id, device=input_ids.device))
    if not is_tracing(ends) and not ends.any(dim=-1).all():
        raise ValueError(
            f"A row of `input_ids` has no `eos_token_id` ({eos_token_id}), whose vector is classified. Append it."
        )
    return ends.to(torch.int32)


def mean_of_tokens(hidden_states: torch.Tensor, real_tokens: torch.Tensor | None) -> torch.Tensor:
    """(batch, length, width) -> (batch, width): the mean over tokens that are not padding, or over all."""
    if real_tokens is None:
        real_tokens = torch.ones(hidden_states.shape[:2], device=hidden_states.device)
    mask = real_tokens.unsqueeze(-1).to(hidden_states.dtype)
    return (hidden_states * mask).sum(dim=1) / mask.sum(dim=1)


def mean_in_float32(hidden_states: torch.Tensor, real_tokens: torch.Tensor | None) -> torch.Tensor:
    """As `mean_of_tokens`, with torch's own mean, which rounds once, where no token is padding (EuroBERT)."""
    return hidden_states.mean(dim=1) if real_tokens is None else mean_of_tokens(hidden_states, real_tokens)


def first_real_token(hidden_states: torch.Tensor, real_tokens: torch.Tensor | None) -> torch.Tensor:
    """(batch, length, width) -> (batch, width): the first token that is not padding."""
    if real_tokens is None:
        return first_token(hidden_states, real_tokens)
    return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), real_tokens.argmax(dim=-1)]


def last_position(hidden_states: torch.Tensor, real_tokens: torch.Tensor | None) -> torch.Tensor:
    """(batch, length, width) -> (batch, width): the last token, padding or not."""
    return hidden_states[:, -1]


def mean_of_positions(hidden_states: torch.Tensor, real_tokens: torch.Tensor | None) -> torch.Tensor:
    """(batch, length, width) -> (batch, width): the mean over all tokens, padding included."""
    return hidden_states.mean(dim=1)


POOLINGS = {
    "first": first_token,
    "last": last_real_token,
    "mean": mean_of_tokens,
    "mean_in_float32": mean_in_float32,
    "mean_of_logits": mean_in_float32,
    "end_of_sequence": last_real_token,
    "first_real": first_real_token,
    "last_position": last_position,
    "mean_of_positions": mean_of_positions,
}

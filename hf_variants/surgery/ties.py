"""Whether the LM head is the embedding."""

from dataclasses import dataclass

import torch

from .operation import Operation
from .subject import APPROXIMATE, SAME_BITS, Outcome, Subject, SurgeryError, edited


HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Untie(Operation):
    """The LM head gets its own copy of the embedding."""

    def apply(self, subject: Subject) -> Subject:
        _refuse_without_head(subject)
        if not subject.config.tie_word_embeddings:
            raise SurgeryError(
                "The LM head is not tied to the embedding (`tie_word_embeddings`). Leave `--untie` out."
            )
        config = edited(subject.config, tie_word_embeddings=False)
        return subject.changed(Outcome("the LM head has its own copy of the embedding", SAME_BITS), config=config)


@dataclass(frozen=True)
class Tie(Operation):
    """
    The LM head becomes the embedding.

    Args:
        force: also where they differ, which changes the function.
    """

    force: bool = False

    def apply(self, subject: Subject) -> Subject:
        _refuse_without_head(subject)
        if subject.config.tie_word_embeddings:
            raise SurgeryError(
                "The LM head is tied to the embedding already (`tie_word_embeddings`). Leave `--tie` out."
            )
        config = edited(subject.config, tie_word_embeddings=True)
        after = subject.changed(Outcome("the LM head is the embedding", SAME_BITS), config=config)
        embedding = after.skeleton.all_tied_weights_keys[HEAD]
        while embedding in after.skeleton.all_tied_weights_keys:
            embedding = after.skeleton.all_tied_weights_keys[embedding]
        head, table = subject.load(HEAD), subject.load(embedding)
        if head.shape != table.shape:
            raise SurgeryError(
                f"The LM head is {tuple(head.shape)} and the embedding {tuple(table.shape)}, which cannot be one tensor. "
                "Leave `--tie` out."
            )
        if torch.equal(head, table):
            return after
        change = ((head.double() - table.double()).norm() / head.double().norm()).item()
        if not self.force:
            raise SurgeryError(
                f"The LM head differs from the embedding, by {change:.2g} of its norm, so that tying them changes the "
                "function. Add `--force` to do it all the same."
            )
        what = f"the LM head is replaced by the embedding, a change of {change:.2g} of its norm"
        return subject.changed(Outcome(what, APPROXIMATE), config=config)


def _refuse_without_head(subject: Subject) -> None:
    if HEAD not in subject.skeleton.state_dict():
        raise SurgeryError(f"{subject.model_class.__name__} has no LM head to tie or untie. Take a language model.")

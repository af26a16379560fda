"""What an operation is: a value that makes one subject of another."""

from collections.abc import Sequence

from .subject import Subject


class Operation:
    """
    One change of a model, a frozen dataclass; `(a, b)` applied one after the other is again an operation on both.

    Operations read config and tensors by name and make others, tensor by tensor, when the result is written.
    """

    def apply(self, subject: Subject) -> Subject:
        """
        The changed model.

        Raises:
            SurgeryError: if it is not possible on this model.
        """
        raise NotImplementedError


def apply(subject: Subject, operations: Sequence[Operation]) -> Subject:
    """Several operations, one after the other."""
    for operation in operations:
        subject = operation.apply(subject)
    return subject

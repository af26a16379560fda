"""What can go wrong in a conversion, each as an exception that says what to do."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class ConversionError(ValueError):
    """A checkpoint cannot be converted as it is."""


class UnsupportedModelType(ConversionError):
    """The native architecture has a mechanism that a `VariantConfig` cannot express."""


class VerificationFailed(ConversionError):
    """
    A conversion that was to be verified made another model than its source is.

    Attributes:
        report (`VerificationReport`): every check, those that hold as well.
    """

    def __init__(self, report: Any, advice: str = "Convert without verifying to look at it, and please report it."):
        self.report = report
        failed = "; ".join(f"{check.name}: {check.detail}" for check in report.checks if not check.ok)
        super().__init__(f"The conversion differs from its source, so nothing was written: {failed}. {advice}")


NOTHING: Mapping[str, Any] = {}


class Unreadable(ConversionError):
    """Code that was not made for some value failed on it."""


@contextmanager
def reading(
    what: str | Path, keys: Mapping[str, Any] = NOTHING, without: Callable[[str], Any] | None = None
) -> Iterator[None]:
    """
    Around code of others, and of ours, that meets values which it may not be made for.

    Args:
        what: the file that the values stand in, or a few words for them.
        keys: of the values, with them.
        without: does the same where one key is left out; what then works was that key's fault.

    Raises:
        ConversionError: naming `what` and the keys, in place of errors that are no sentences of their own.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, Unreadable) and without is not None:
            # What is inside may not know the keys.
            error = error.__cause__ or error
        elif isinstance(error, (ConversionError, FileNotFoundError, MemoryError)):
            raise
        blamed = [f"`{key}`" for key in _to_blame(error, keys, without)]
        where = f"{what}, {' or '.join(blamed[:3])}" if blamed else what
        raise Unreadable(
            f"{where}: {one_line(error)}. Correct the value, or fetch the file again; if transformers takes it as it is, "
            "report this as a fault of hf-variants, with what --debug shows."
        ) from error


def _to_blame(error: Exception, values: Mapping[str, Any], without: Callable[[str], Any] | None) -> list[str]:
    if without is None or _works(without, ""):
        return []
    alone = [key for key in values if _works(without, key)]
    zeros = [key for key, value in values.items() if value == 0 and type(value) in (int, float)]
    return alone or (zeros if isinstance(error, ZeroDivisionError) else [])


def _works(without: Callable[[str], Any], key: str) -> bool:
    try:
        without(key)
    except Exception:
        return False
    return True


def one_line(error: BaseException, limit: int = 400) -> str:
    """What an error of a library says, without its line breaks and final stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines)
    said = said if len(said) <= limit else f"{said[: limit - 3]}..."
    # A sentence speaks for itself; a name, a number or nothing does not.
    kind = "" if isinstance(error, ValueError) and " " in said else f"{type(error).__name__}: "
    return f"{kind}{said}".rstrip(". :")


def _short(value: Any, limit: int = 160) -> str:
    shown = repr(value)
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


class Refusal(str):
    """In place of a native value: why a native config cannot be made of ours."""


class NotRepresentable(ConversionError):
    """
    A variant has no exact counterpart in a native architecture.

    Attributes:
        model_type (`str`): the native architecture that was asked for, or the nearest one.
        fields (`dict[str, tuple]`): for every field in the way its value here, and the only one the native type has or a
            `Refusal`.
    """

    def __init__(self, model_type: str, fields: dict[str, tuple], advice: str = ""):
        self.model_type = model_type
        self.fields = fields
        ways = "; ".join(
            f"`{name}` is {_short(ours)}, which {model_type} does not take ({' '.join(native.split()).rstrip('.')})"
            if isinstance(native, Refusal)
            else f"`{name}` is {_short(ours)} but {model_type} has {_short(native)}"
            for name, (ours, native) in fields.items()
        )
        super().__init__(
            f"This variant is not a {model_type} model: {ways}. "
            + (advice or "Change those fields, or export to another type (`hf-variants families` lists them).")
        )

"""What can go wrong in a conversion, each as an exception that says what to do."""

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

    def __init__(self, report: Any):
        self.report = report
        failed = "; ".join(f"{check.name}: {check.detail}" for check in report.checks if not check.ok)
        super().__init__(
            f"The conversion differs from its source, so nothing was written: {failed}. Convert without verifying to "
            "look at it, and please report it."
        )


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

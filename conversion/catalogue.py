"""The list of native types as a page: what converts, how exactly, and what does not convert for which reason."""

import transformers

from . import refusals
from .family import Deviation, Family, all_families


def families_markdown() -> str:
    """The page `docs/families.md`, for the installed transformers."""
    lines = [
        "# Native model types",
        "",
        f"Made with transformers {transformers.__version__} by `hf-variants families --markdown > docs/families.md`.",
        "",
        "Every type below converts both ways, with the heads of the listed stock classes. *Bit-identical* means: for",
        "random configs and weights, the variant's logits, gradients and generated tokens equal those of the stock",
        "class in float32 and bfloat16, bit for bit. Where an operation must round differently, its reason is given.",
        "*Attention* is what the stock class runs where nobody says otherwise, and so does its variant: transformers'",
        "choice, or eager, where the class has nothing else. Other backends round otherwise, in either class alike.",
        "",
        "| type | stock classes | attention | exactness |",
        "|---|---|---|---|",
    ]
    families = all_families()
    lines += [
        f"| `{name}` | {_classes(family)} | {_attention(family)} | {_exactness(family)} |"
        for name, family in families.items()
    ]
    lines += [
        "",
        "## Not converted",
        "",
        "Causal language models of this transformers without a family here, and the mechanism that one dense stack",
        "lacks for them. *None known* means that nobody has written the family yet:",
        "[CONTRIBUTING.md](../CONTRIBUTING.md) says how.",
        "",
        "| type | missing mechanism |",
        "|---|---|",
    ]
    uncovered = refusals.uncovered(families)
    lines += [f"| `{name}` | {mechanism or 'none known'} |" for name, mechanism in uncovered.items()]
    return "\n".join(lines) + "\n"


def _classes(family: Family) -> str:
    parts = (family, *family.parts)
    names = [part.native_class(head).__name__ for part in parts for head in part.converted_heads]
    return ", ".join(dict.fromkeys(f"`{name}`" for name in names))


def _attention(family: Family) -> str:
    return "of its own code" if family.own_models else "eager" if family.runs_eager else "sdpa"


def _exactness(family: Family) -> str:
    if not family.deviations:
        return "bit-identical"
    outputs = [deviation for deviation in family.deviations if not deviation.gradients_only]
    gradients = [deviation for deviation in family.deviations if deviation.gradients_only]
    parts = (
        [f"logits within {max(d.bound for d in outputs):.0e} of their spread: {_reasons(outputs)}"] if outputs else []
    )
    if gradients:
        parts.append(f"{'' if outputs else 'logits bit-identical; '}gradients: {_reasons(gradients)}")
    return "; ".join(parts)


def _reasons(deviations: list[Deviation]) -> str:
    return "; ".join(dict.fromkeys(deviation.reason for deviation in deviations)).replace("|", "\\|")

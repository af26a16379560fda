"""What this project publishes: the page of its presets, each with a drawing and the fields that make it."""

from pathlib import Path

from .describe import one_line
from .drawing import block_svg
from .model.configuration_variant import VariantConfig
from .presets import PRESETS


PAGE = "presets.md"
DRAWINGS = "drawings"
HEADER = """\
# Presets

Made by `hf-variants presets --page model_cards`; do not edit. A preset holds the axes of a published architecture and no
sizes: the drawings have the sizes that a config has by default. No weights come with them.

```python
from hf_variants import VariantConfig

config = VariantConfig.from_preset("gemma2", hidden_size=512, num_hidden_layers=8)
```
"""


def write_page(folder: str | Path) -> Path:
    """Write presets.md and the drawings it shows, drawings/*.svg, into a folder; return the page's path."""
    drawings = Path(folder) / DRAWINGS
    drawings.mkdir(parents=True, exist_ok=True)
    sections = [HEADER]
    for name in sorted(PRESETS):
        config = VariantConfig.from_preset(name)
        (drawings / f"{name}.svg").write_text(block_svg(config), encoding="utf-8")
        sections.append(_section(name, config))
    path = Path(folder) / PAGE
    path.write_text("\n".join(sections), encoding="utf-8")
    return path


def _section(name: str, config: VariantConfig) -> str:
    preset = PRESETS[name]
    values = config.to_dict()
    rows = [f"| `{field}` | {one_line(values[field])} |" for field in preset.axes]
    return "\n".join(
        [
            f"## {name}",
            "",
            f"{preset.description} ({preset.source})",
            "",
            f"![One block of {name}]({DRAWINGS}/{name}.svg)",
            "",
            "| field | value |",
            "|---|---|",
            *rows,
            "",
        ]
    )

"""docs/architecture.md: the axes, with figures of the claims' runs and of `cost`, and drawings made from configs."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_variants import VariantConfig
from hf_variants.ablate.plan import read_plan
from hf_variants.ablate.report import verdicts
from hf_variants.cost.cache import cache_bytes
from hf_variants.cost.compute import forward_flops
from hf_variants.cost.parameters import count_parameters, structure
from hf_variants.cost.report import scaled
from hf_variants.drawing import block_svg
from hf_variants.model.part import Call
from hf_variants.sizes import readable


HERE = Path(__file__).parent
DRAWINGS = "architecture"
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}  # fmt: skip
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"vocab_size": 50257, "max_position_embeddings": 1024}),
    "llama-8b": ("llama", LLAMA),
    "llama-70b": ("llama", LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                                    "num_attention_heads": 64}),
    "gemma3-4b": ("gemma3", {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
                             "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
                             "sliding_window": 1024, "max_position_embeddings": 131072}),
}  # fmt: skip
# Of small drawings: what differs from Llama's block.
SMALL: dict[str, dict[str, Any]] = {
    "post": {"norm_placement": "post"}, "pre": {}, "sandwich": {"norm_placement": "sandwich"},
    "deepnorm": {"norm_placement": "deepnorm"}, "ungated": {"ffn_type": "mlp", "hidden_act": "relu"}, "gated": {},
    "rope": {}, "alibi": {"position_embedding_type": "alibi"}, "learned": {"position_embedding_type": "learned"},
}  # fmt: skip


def model(name: str, **fields: Any) -> Any:
    preset, sizes = SIZES[name]
    return structure(VariantConfig.from_preset(preset, **{**sizes, **fields}))


class Figures:
    """
    What the template calls.

    Args:
        results: folder of summaries.
        docs: folder of the page, beside which drawings go.
    """

    def __init__(self, results: Path, docs: Path):
        self.results, self.folder = results, docs / DRAWINGS
        self.folder.mkdir(parents=True, exist_ok=True)

    def drawing(self, name: str, text: str, preset: str = "llama", **fields: Any) -> str:
        config = VariantConfig.from_preset(preset, **fields)
        (self.folder / f"{name}.svg").write_text(block_svg(config), encoding="utf-8")
        return f"![{text}]({DRAWINGS}/{name}.svg)"

    def drawings(self, group: str, names: tuple[str, ...]) -> str:
        images = [self.drawing(f"{group}-{name}", name, **SMALL[name]) for name in names]
        return "\n".join([f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", f"| {' | '.join(images)} |"])

    def has(self, plan: str) -> bool:
        """Whether a plan has been run."""
        return (self.results / f"{plan}.json").exists()

    def _summary(self, plan: str) -> dict[str, Any]:
        return json.loads((self.results / f"{plan}.json").read_text(encoding="utf-8"))

    def said(self, plan: str) -> str:
        return " ".join(verdicts(self._summary(plan)))

    def caveat(self, plan: str) -> str:
        return self._summary(plan)["caveat"]

    def metric(self, plan: str, config: str, name: str) -> str:
        found = self._summary(plan)["configs"][config]["metrics"][name]
        return f"{found['mean']:.3g} ± {found['sd']:.2g}"

    def millions(self, name: str) -> str:
        return f"{count_parameters(model(name)).total / 1e6:,.0f}"

    def share(self, name: str, *kinds: str) -> str:
        counted = count_parameters(model(name))
        return f"{sum(counted.by_part.get(kind, 0) for kind in kinds) / counted.total:.0%}"

    def operations(self, name: str) -> str:
        length = 1024
        return scaled(forward_flops(model(name), Call(1, length)).masked / length)

    def whole_cache(self, name: str) -> str:
        longest = model(name).arguments["config"].max_position_embeddings
        found = cache_bytes(model(name), min(8192, longest))
        assert found is not None
        return readable(found.theory) + (f" (at its {longest:,})" if longest < 8192 else "")

    def cache(self, heads: int) -> dict[str, str]:
        found = cache_bytes(model("llama-8b", num_key_value_heads=heads), 8192)
        assert found is not None
        return {"per_token": readable(found.per_token), "whole": readable(found.theory)}

    def hybrid_cache(self) -> str:
        plan, _ = read_plan(HERE / "plans" / "08-hybrid.yaml")
        sizes = {}
        for name in ("hybrid", "full"):
            config = VariantConfig(vocab_size=68, **{**plan.base, **plan.configs[name]})
            sizes[name] = cache_bytes(structure(config), plan.lengths[-1])
        return f"{sizes['hybrid'].theory / sizes['full'].theory:.0%}"

    def gemma_cache(self) -> str:
        layers = SIZES["gemma3-4b"][1]["num_hidden_layers"]
        full = model("gemma3-4b", layer_types=["full_attention"] * layers, sliding_window=None)
        return f"{cache_bytes(model('gemma3-4b'), 32768).theory / cache_bytes(full, 32768).theory:.0%}"


def write_architecture(results: Path, docs: Path) -> None:
    """The page and its drawings."""
    figures = Figures(results, docs)
    environment = Environment(loader=FileSystemLoader(HERE), undefined=StrictUndefined, keep_trailing_newline=True)
    functions = {name: getattr(figures, name) for name in dir(figures) if name[0] != "_"}
    page = environment.get_template("architecture.md.jinja").render(**functions)
    (docs / "architecture.md").write_text(page, encoding="utf-8")

"""The table of docs/adapters.md: methods of PEFT on native types, onto the variant and back, each cell from a run.

python -m tests.adapter_table > docs/adapters.md
"""

import copy
import itertools
import random
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version

import peft
import torch
import transformers
from peft import PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_variants.conversion import ConversionError, from_native
from hf_variants.conversion.adapters import Adapter, Pair, put_on, translate_adapter
from hf_variants.conversion.family import family_of
from tests.native_rows import all_rows
from tests.parity import hostile_, inputs_of, logits_of, relative_error


TYPES = (
    "llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "falcon", "bloom", "mpt", "opt", "phi3", "gpt_bigcode",
    "t5", "bart", "bert", "roberta",
)  # fmt: skip
# Of products summed in another order, in float32, relative to the spread of the logits; families that deviate by
# themselves (BLOOM, MPT) are within it, too.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Method:
    """
    A row of the table.

    Args:
        name: as people call it.
        config: makes PEFT's config, of keyword arguments.
        merges: whether PEFT merges it into the weights.
    """

    name: str
    config: Callable[..., PeftConfig]
    merges: bool = True

    def for_model(self, model: PreTrainedModel, task: str | None) -> PeftConfig:
        """The config with PEFT's default targets, or without a default with every linear layer, or every norm."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                get_peft_model(copy.deepcopy(model), self.config(task_type=task))
            return self.config(task_type=task)
        except ValueError as error:
            if "target_modules" not in str(error):
                raise
        if self.config is peft.LNTuningConfig:
            norms = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
            return self.config(task_type=task, target_modules=norms)
        more = {"feedforward_modules": []} if self.config is peft.IA3Config else {}
        return self.config(task_type=task, **ALL, **more)


ALL = {"target_modules": "all-linear"}
METHODS = {
    method.name: method
    for method in (
        Method("LoRA", partial(peft.LoraConfig, r=4, lora_alpha=7)),
        Method("LoRA, all-linear", partial(peft.LoraConfig, r=4, **ALL)),
        Method("LoRA with biases", partial(peft.LoraConfig, r=4, lora_bias=True, bias="lora_only")),
        Method("rsLoRA", partial(peft.LoraConfig, r=4, use_rslora=True)),
        Method("DoRA", partial(peft.LoraConfig, r=4, use_dora=True)),
        Method("AdaLoRA", partial(peft.AdaLoraConfig, init_r=4, target_r=2, total_step=20, tinit=2, tfinal=2)),
        Method("IA3", peft.IA3Config),
        Method("LoHa", partial(peft.LoHaConfig, r=4, alpha=3, **ALL)),
        Method("LoKr", partial(peft.LoKrConfig, r=4, **ALL)),
        Method("VeRA", partial(peft.VeraConfig, r=4)),
        Method("OFT", partial(peft.OFTConfig, oft_block_size=4, **ALL)),
        Method("HRA", partial(peft.HRAConfig, r=4, **ALL)),
        Method("FourierFT", partial(peft.FourierFTConfig, n_frequency=20, **ALL)),
        Method("MiSS", partial(peft.MissConfig, r=4, **ALL)),
        Method("LN-tuning", peft.LNTuningConfig),
        Method("prompt tuning", partial(peft.PromptTuningConfig, num_virtual_tokens=3), merges=False),
        Method("prefix tuning", partial(peft.PrefixTuningConfig, num_virtual_tokens=3), merges=False),
        Method("P-tuning", partial(peft.PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=16), merges=False),
    )
}  # fmt: skip
TASKS = {"causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM", "sequence_classification": "SEQ_CLS"}


@dataclass
class Outcome:
    """
    One cell: `"="` equal bits, `"~"` equal up to rounding, `"refused"`, `"n/a"` (PEFT itself has no such adapter).

    Products of other shapes are equal up to rounding even where they give the same bits: that is up to the CPU.
    """

    kind: str
    detail: str = ""


def head_for(model_type: str) -> str:
    """The head that adapters of this type are trained with."""
    primary = family_of(model_type).primary
    return "sequence_classification" if primary == "masked_lm" else primary


def native_model(model_type: str) -> PreTrainedModel:
    """A stock model with hostile weights and several heads, whose sizes block-wise methods can divide."""
    family = family_of(model_type)
    for seed in itertools.count():
        drawn = all_rows()[model_type].draw(random.Random(f"{model_type}-{seed}"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = family.config_map.native_class(**drawn)
        if config.num_attention_heads > 1 and config.hidden_size % 8 == 0 and config.hidden_size < 100:
            break
    torch.manual_seed(0)
    return hostile_(family.native_class(head_for(model_type))(config)).eval()


@cache
def sides(model_type: str) -> tuple[PreTrainedModel, PreTrainedModel, Pair]:
    """The stock model, its variant, and both without memory; none of them is to be changed."""
    native = native_model(model_type)
    return native, from_native(native), Pair.of_native(native.config, head_for(model_type))


def trained(model: PreTrainedModel, config: PeftConfig, seed: int = 0) -> peft.PeftModel:
    """The model with an adapter of random values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + 0.2 * noise) + 0.1 * noise
    return wrapped


def adapter_of(wrapped: peft.PeftModel) -> Adapter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(wrapped)
    return Adapter(copy.deepcopy(wrapped.peft_config["default"]), {n: t.clone() for n, t in state.items()})


def shapes(adapter: Adapter) -> list[torch.Size]:
    return sorted(tensor.shape for tensor in adapter.tensors.values())


def outputs(wrapped: peft.PeftModel) -> torch.Tensor:
    base = wrapped.get_base_model() if isinstance(wrapped, peft.PeftModel) else wrapped
    batch = inputs_of(base, 12)["long"]
    return logits_of(wrapped, batch)


def compared(made: torch.Tensor, reference: torch.Tensor) -> Outcome:
    if torch.equal(made, reference):
        return Outcome("=")
    error = relative_error(made, reference)
    if error <= ROUNDING:
        return Outcome("~", f"{error:.0e}")
    return Outcome("WRONG", f"{error:.2e}")


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    order = ("=", "~", "refused", "WRONG")
    return max(outcomes, key=lambda outcome: order.index(outcome.kind))


def run(method: Method, model_type: str, to_native: bool = False) -> Outcome:
    """Train on one side, translate, compare logits live and merged, and what comes back."""
    native, variant, pair = sides(model_type)
    head = head_for(model_type)
    source, target = (variant, native) if to_native else (native, variant)
    try:
        config = method.for_model(source, TASKS[head])
        wrapped = trained(copy.deepcopy(source), config)
        expected = outputs(wrapped)
    except (ValueError, TypeError, RuntimeError) as error:
        return Outcome("n/a", _first_sentence(error))
    assert not torch.equal(expected, outputs(source)), "the adapter does nothing"
    adapter = adapter_of(wrapped)
    try:
        made, _ = translate_adapter(adapter, pair, to_native)
    except ConversionError as error:
        return Outcome("refused", str(error))
    loaded = put_on(copy.deepcopy(target), made)
    found = [compared(outputs(loaded), expected)]
    if shapes(made) != shapes(adapter):
        found.append(Outcome("~", "other shapes"))
    if method.merges:
        got, reference = merged(loaded), merged(wrapped)
        if got is not None and reference is not None:
            found.append(compared(got, reference))
    again, _ = translate_adapter(made, pair, not to_native)
    same = again.tensors.keys() == adapter.tensors.keys() and all(
        torch.equal(tensor, adapter.tensors[name]) for name, tensor in again.tensors.items()
    )
    if not same:
        found.append(compared(outputs(put_on(copy.deepcopy(source), again)), expected))
    return worst(found)


def merged(wrapped: peft.PeftModel) -> torch.Tensor | None:
    """
    Outputs with the adapter merged into the weights; `None` where PEFT cannot: a bias of the adapter has no place in a layer
    without one, and a stored module of several layers (a classifier's) stops it for methods other than LoRA.
    """
    try:
        return outputs(wrapped.merge_and_unload())
    except (RuntimeError, AttributeError) as error:
        if "Impossible to merge" in str(error) or "has no attribute 'weight'" in str(error):
            return None
        raise


def _first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].partition(". ")[0].rstrip(".")


HEADER = f"""\
# Adapters: methods and native types

Made by `make adapters` from what ran, with peft {version("peft")}; do not edit. In each cell an adapter with random values
was put on a stock model of the type and carried over to its variant, and another on the variant and carried over to the
stock model ("first / second" where they differ): logits were compared, live and merged into the weights (where PEFT merges),
and with the adapter that comes back.

- **=**: equal bits everywhere.
- **~**: equal up to rounding, at most {ROUNDING:.0e} of the logits' standard deviation in float32: the products have other
  shapes (one weight there, three here), which round alike on some CPUs only, or the type itself rounds differently
  ([families.md](families.md)).
- **refused**: the method's parameters have no exact counterpart, mostly because one weight there is several here; the
  message names method and module. Merge such an adapter and convert the model.
- **n/a**: PEFT itself cannot put it on that model (most methods do not know GPT-2's `Conv1D`).

Targets are PEFT's defaults for the type, or every linear layer where the method has none. Encoders are classifiers, whose
heads are trained and stored whole.

"""


def page(cell: Callable[[str, str], str]) -> str:
    """The page, of what `cell` says of method and type."""
    lines = [HEADER + "| | " + " | ".join(TYPES) + " |", "|---" * (len(TYPES) + 1) + "|"]
    for name in tqdm(METHODS, unit="method", file=sys.stderr):
        lines.append(f"| {name} | " + " | ".join(cell(name, model_type) for model_type in TYPES) + " |")
    return "\n".join(lines) + "\n"


def run_cell(name: str, model_type: str) -> str:
    """Both directions, as the page shows them."""
    kinds = [run(METHODS[name], model_type, to_native).kind for to_native in (False, True)]
    return kinds[0] if kinds[0] == kinds[1] else f"{kinds[0]} / {kinds[1]}"


def main() -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    made = page(run_cell)
    print(made, end="")
    return int("WRONG" in made)


if __name__ == "__main__":
    sys.exit(main())

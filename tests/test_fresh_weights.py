"""New weights are drawn as the stock class draws them: mean, spread and zeros of every tensor, over all native types."""

import random

import pytest
import torch

import hf_variants
from hf_variants.conversion import rules
from hf_variants.conversion.family import family_of
from hf_variants.conversion.skeleton import stored_tensors
from tests.native_rows import all_rows
from tests.parity import hostile_


ROWS = all_rows()
TYPES = [name for name, row in ROWS.items() if not row.reference]
MODELS = 3
# Keys of a native config that speak of new weights, each at a value that no default has.
SPREADS = {"initializer_range": 0.05, "init_std": 0.05, "initializer_factor": 0.7, "initializer_cutoff_factor": 1.3,
           "sinusoidal_pos_embds": True}  # fmt: skip
# Matrices of the class that are drawn when they are made, with 0.02 whatever the config says.
NOT_READ = {"openai-gpt": {"initializer_range"}}
HEADS = frozenset({"score", "classifier", "pre_classifier", "qa_outputs"})


def fresh(model_type: str, head: str, models: int, **fixed):
    """Tensors of a few new models under native names: of the stock class, and of ours."""
    family = family_of(model_type)
    options = ROWS[model_type].draw(random.Random(f"{model_type}-0"))
    declared = family.config_map.native_class(**options).to_dict()
    read = declared.keys() - NOT_READ.get(model_type, set())
    options |= {key: value for key, value in SPREADS.items() if key in read}
    config = family.config_map.native_class(**options | fixed)
    variant = family.config_map.to_variant(config, head=head)
    torch.manual_seed(0)
    stock, ours = [], []
    for _ in range(models):
        stock.append(stored_tensors(family.native_class(head)(config)))
        shapes = {name: tensor.shape for name, tensor in stock[-1].items()}
        own = stored_tensors(family.variant_class(head)(variant))
        steps = rules.plan(family.rules_for(head), list(own), shapes, to_native=True)
        ours.append(dict(rules.run(steps, own.__getitem__, variant, shapes, to_native=True)))
    return stock, ours


def own_tensors(model_type: str) -> dict[str, frozenset[str] | None]:
    """By head, the tensors to compare: all of the primary one's, and what each further head alone has."""
    family = family_of(model_type)
    heads = [head for head in family.converted_heads if head not in ("base", family.primary)]
    return {family.primary: None} | dict.fromkeys(heads, HEADS)


@pytest.mark.parametrize("model_type", TYPES)
def test_new_weights(model_type):
    for head, parts in own_tensors(model_type).items():
        stock, ours = fresh(model_type, head, models=MODELS if parts is None else 1)
        for name in stock[0]:
            if parts is not None and not parts & set(name.split(".")[:-1]):
                continue
            theirs, made = (
                torch.cat([model[name].flatten().double() for model in models]) for models in (stock, ours)
            )
            # Of a single number, the bias of a score of choices, the spread is 0.
            stds = [values.std(correction=min(1, values.numel() - 1)) for values in (theirs, made)]
            spread, count = max(stds).item(), theirs.numel()
            # Six standard errors of the mean, and of the standard deviation.
            assert abs(theirs.mean() - made.mean()) <= 6 * spread / count**0.5 + 1e-7, (head, name)
            assert abs(stds[0] - stds[1]) <= 6 * spread / (2 * count) ** 0.5 + 1e-7, (head, name)
            assert (theirs == 0).sum() == (made == 0).sum(), (head, name)


def test_an_untied_head_by_what_it_scores():
    """T5Gemma's: narrower than any other matrix of the model."""
    stock, ours = fresh("t5gemma", "seq2seq_lm", models=1, tie_word_embeddings=False)
    theirs, made = (models[0]["lm_head.out_proj.weight"].std() for models in (stock, ours))
    assert abs(theirs - made) < 0.1 * theirs


def resized(model, mean_resizing: bool):
    torch.manual_seed(3)
    model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + 7, mean_resizing=mean_resizing)
    head = model.get_output_embeddings()
    return [model.get_input_embeddings().weight] + ([head.weight] if head is not None else [])


# mBART's stock class resizes a table that nothing reads first.
@pytest.mark.parametrize("model_type", [name for name in TYPES if name != "mbart"])
def test_rows_of_new_tokens(model_type):
    family = family_of(model_type)
    config = family.config_map.native_class(**ROWS[model_type].draw(random.Random(f"{model_type}-0")))
    # Marian's stock class takes the mean whatever it is told. With a cutoff, ModernBERT's draws new rows without; here they
    # are drawn as the table was.
    plain_rows = model_type != "marian" and not hasattr(config, "initializer_cutoff_factor")
    stock = hostile_(family.native_class(family.primary)(config))
    ours = hf_variants.from_native(stock)
    for mean_resizing in (True, False)[: 1 + plain_rows]:
        theirs, made = resized(stock, mean_resizing), resized(ours, mean_resizing)
        assert all(map(torch.equal, theirs, made))

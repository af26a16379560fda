"""In training mode every native type and head drops what its stock class drops: the same seed gives the same bits."""

import random
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from transformers import set_seed

import hf_variants
from hf_variants.conversion.family import family_of
from tests.native_rows import all_rows
from tests.parity import Row, as_choices, hostile_, inputs_of, set_backend


ROWS = all_rows()
# So far apart that no two could be mixed up.
PROBABILITIES = (0.11, 0.13, 0.17, 0.19, 0.23, 0.29, 0.31, 0.37)


@contextmanager
def recorded_dropout():
    """What is dropped meanwhile: the probability and the number of values, in order."""
    seen: list[tuple[str, float, int]] = []
    dropout, attend = F.dropout, F.scaled_dot_product_attention

    def drop(input, p=0.5, training=True, inplace=False):
        if training and p:
            seen.append(("dropout", p, input.numel()))
        return dropout(input, p, training, inplace)

    def attend_and_drop(query, *args, dropout_p=0.0, **kwargs):
        if dropout_p:
            seen.append(("sdpa", dropout_p, query.numel()))
        return attend(query, *args, dropout_p=dropout_p, **kwargs)

    F.dropout, F.scaled_dot_product_attention = drop, attend_and_drop
    try:
        yield seen
    finally:
        F.dropout, F.scaled_dot_product_attention = dropout, attend


def set_dropout(options: dict, declared: dict, layerdrop: float, unset: bool) -> None:
    """
    Give every key of a native config that speaks of dropout a value of its own.

    Args:
        options: keyword arguments of the config class, changed in place.
        declared: what the class makes of them.
        unset: leave those that the class leaves at `None`, for which it falls back on others.
    """
    probabilities = iter(PROBABILITIES)
    for key, value in declared.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, dict) and isinstance(options.get(key, {}), dict):
            inner = dict(options.get(key, {}))
            set_dropout(inner, value, layerdrop, unset)
            if inner:
                options[key] = inner
        elif "layerdrop" in key:
            options[key] = layerdrop
        elif ("drop" in key or key.endswith("pdrop")) and (value is None or isinstance(value, float)):
            options[key] = None if value is None and unset else next(probabilities)


def options_with_dropout(row: Row, unset: bool, seed: int = 0) -> dict:
    """Keyword arguments of the row's config class."""
    options = row.draw(random.Random(f"{row.model_type}-{seed}"))
    declared = family_of(row.model_type).config_map.native_class(**options).to_dict()
    set_dropout(options, declared, layerdrop=0.4, unset=unset)
    return options


def stock_model(row: Row, head: str, options: dict):
    family = family_of(row.model_type)
    stock_class = row.reference if row.reference and head == family.primary else family.native_class(head)
    return hostile_(stock_class(family.config_map.native_class(**options)))


def outputs_and_dropout(model, batch: dict):
    set_seed(5)
    arguments = {"use_cache": False} if model.can_generate() else {}
    with recorded_dropout() as seen:
        outputs = model.train()(**batch, **arguments)
    made = outputs.logits if "logits" in outputs else outputs.get("start_logits", outputs[0])
    return made, seen


@pytest.mark.parametrize(
    ("model_type", "seed"), [*((name, 0) for name in ROWS), *(("falcon", n) for n in range(1, 5))]
)
def test_stock_class_and_variant_drop_the_same(model_type, seed):
    row, family = ROWS[model_type], family_of(model_type)
    all_set, partly_set = (options_with_dropout(row, unset, seed) for unset in (False, True))
    for head in family.converted_heads:
        # A stand-in for a class that transformers lacks computes nothing with other heads.
        if row.reference and head != family.primary:
            continue
        for options in [all_set] if all_set == partly_set else [all_set, partly_set]:
            stock = stock_model(row, head, options)
            ours = hf_variants.from_native(stock)
            backends = row.backends if isinstance(row.backends, tuple) else row.backends(stock.config)
            batch = as_choices(head, inputs_of(stock, 16)["long"])
            # What a key falls back on does not depend on the backend.
            for backend in backends if options is all_set else backends[:1]:
                if backend == "sdpa" and not ours._supports_sdpa:
                    continue
                set_backend(stock, ours, backend)
                (expected, dropped), (made, own) = (outputs_and_dropout(model, batch) for model in (stock, ours))
                assert own == dropped, (head, backend)
                assert family.deviations or torch.equal(made, expected), (head, backend)


@pytest.mark.parametrize("model_type", ["t5", "bart", "gpt2", "llama", "bert", "falcon"])
def test_gradients_of_a_step_with_dropout_are_the_same(model_type):
    row, family = ROWS[model_type], family_of(model_type)
    stock = stock_model(row, family.primary, options_with_dropout(row, unset=True))
    ours = hf_variants.from_native(stock)
    batch = inputs_of(stock, 16)["long"]
    gradients = []
    for model in (stock, ours):
        model.set_attn_implementation("eager")
        logits, _ = outputs_and_dropout(model, batch)
        logits.square().mean().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    if not family.deviations:
        assert torch.equal(*gradients)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-4 * gradients[0].std().item())


def test_a_key_that_only_the_head_on_every_token_reads_is_kept():
    config_class = family_of("llama").config_map.native_class
    stock = config_class(num_hidden_layers=1, classifier_dropout=0.3, hidden_dropout=0.4)
    config = family_of("llama").config_map.to_variant(stock)
    assert (config.token_classifier_dropout, config.classifier_dropout, config.qa_dropout) == (0.3, 0.0, 0.0)
    back = family_of("llama").config_map.to_native(config)
    assert (back.classifier_dropout, back.hidden_dropout) == (0.3, 0.4)

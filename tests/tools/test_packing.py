"""Documents packed into one row are computed as if each were alone, or refused; with a collator and in bare loops."""

import pytest
import torch
from transformers import DataCollatorWithFlattening
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_variants import (
    VariantForQuestionAnswering,
    VariantForSequenceClassification,
    VariantForTokenClassification,
    VariantModel,
)

from . import kinds


PACKED_KINDS = (*kinds.DECODERS, "encoder")
# Every way in which a layer knows position, and whom it sees.
SHAPES = {
    "rope": {},
    "yarn": {
        "max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8,
        },
    },
    "window": {"layer_types": "SF", "sliding_window": 3},
    "learned": {"position_embedding_type": "learned"},
    "offset": {"position_embedding_type": "learned", "position_offset": 2, "position_ids_source": "attention_mask"},
    "sinusoidal": {"position_embedding_type": "sinusoidal"},
    "growing table": {
        "position_embedding_type": "sinusoidal", "sinusoidal_table_grows": True, "max_position_embeddings": 4,
    },
    "alibi": {"position_embedding_type": "alibi"},
    "alibi with window": {"position_embedding_type": "alibi", "layer_types": "SF", "sliding_window": 3},
    "relative bias": {"position_embedding_type": "relative_bias", "relative_attention_max_distance": 40},
    "relative bias per layer": {"position_embedding_type": "relative_bias", "relative_attention_per_layer": True},
    "none": {"position_embedding_type": "none"},
    "caps": {"attn_logit_softcapping": 2.0},
    "sinks": {"attention_sinks": True},
    "masked padding": {"padding_mask_source": "input_ids"},
}  # fmt: skip
DECODER_SHAPES = {
    **SHAPES,
    "alibi of key positions": {"position_embedding_type": "alibi", "alibi_form": "key_position"},
    "alibi of key indices": {"position_embedding_type": "alibi", "alibi_form": "key_index"},
    "alibi of key offsets": {"position_embedding_type": "alibi", "alibi_form": "key_offset"},
    "rope in some layers": {"no_rope_layers": [1, 0]},
}
LENGTHS = ((7, 6, 1, 4), (5, 2, 8, 3))


def documents(rows=2, seed=5):
    """Rows of documents, equally long in all."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(3, kinds.VOCABULARY, (1, n), generator=generator) for n in lengths]
            for lengths in LENGTHS[:rows]]  # fmt: skip


def pack(rows):
    """Token ids and position ids, (rows, length) both."""
    ids = torch.cat([torch.cat(row, 1) for row in rows])
    return ids, torch.stack([torch.cat([torch.arange(document.shape[1]) for document in row]) for row in rows])


def build(decoder, implementation=None, model_class=VariantModel, **fields):
    model = kinds.model("llama" if decoder else "encoder", model_class, **fields)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model


def assert_close(out, expected, tolerance=2e-5):
    assert out.shape == expected.shape
    assert (out - expected).abs().max() < tolerance * expected.std()


CASES = [(True, shape) for shape in DECODER_SHAPES] + [(False, shape) for shape in SHAPES]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("decoder", "shape"), CASES)
def test_a_bare_loop_sees_each_document_alone(decoder, shape, rows):
    for implementation in ("eager", "sdpa"):
        try:
            model = build(decoder, implementation, **DECODER_SHAPES[shape])
        except ValueError as error:
            assert "cannot compute" in str(error)  # noqa: PT017
            continue
        unpacked = documents(rows)
        ids, positions = pack(unpacked)
        with torch.no_grad():
            expected = torch.cat([torch.cat([model(document).last_hidden_state for document in row], 1)
                                  for row in unpacked])  # fmt: skip
            for use_cache in (True, False):
                assert_close(model(ids, position_ids=positions, use_cache=use_cache).last_hidden_state, expected)
        embeds = model.embed_tokens(ids).detach().requires_grad_()
        out = model.train()(inputs_embeds=embeds, position_ids=positions).last_hidden_state
        assert_close(out.detach(), expected)
        # Of what the second document gives, nothing depends on the others, to the last bit.
        first, second, *_ = LENGTHS[0]
        out[0, first : first + second].square().sum().backward()
        own = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        own[0, first : first + second] = True
        assert not embeds.grad[~own].any()
        assert embeds.grad[own].any()


@pytest.mark.tool("packing in a bare loop", package="transformers")
@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_gradients_are_those_of_the_documents(kind):
    # A key's bias gets a gradient that cancels in the softmax: in float32, rounding is all of it.
    model = kinds.model(kind).double().train()
    unpacked = documents()
    ids, positions = pack(unpacked)
    labels = ids.masked_fill(positions == 0, -100)
    count = (labels != -100).sum()
    model(ids, position_ids=positions, labels=labels, num_items_in_batch=count).loss.backward()
    packed = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for row in unpacked:
        for document in row:
            targets = document.clone()
            targets[:, 0] = -100
            model(document, labels=targets, num_items_in_batch=count).loss.backward()
    for gradient, parameter in zip(packed, model.parameters(), strict=True):
        assert (gradient - parameter.grad).abs().max() < 1e-6 * parameter.grad.abs().max() + 1e-15


@pytest.mark.tool("DataCollatorWithFlattening", package="transformers")
@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_the_flattening_collator(kind):
    model = kinds.model(kind)
    flat = [document for row in documents() for document in row]
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": document[0].tolist()} for document in flat])
    assert "attention_mask" not in batch
    with torch.no_grad():
        out = model(**batch)
        expected = torch.cat([model(document).logits for document in flat], 1)
    assert_close(out.logits, expected)
    kept = batch["labels"] != -100
    logits = expected[:, :-1][kept[:, 1:]] if kind != "encoder" else expected[kept]
    assert abs(out.loss - torch.nn.functional.cross_entropy(logits, batch["labels"][kept])) < 1e-5


@pytest.mark.parametrize(
    "kind", [*[pytest.param(kind, marks=pytest.mark.whole) for kind in kinds.DECODERS], "encoder"]
)
@torch.no_grad()
def test_a_compiled_graph_separates_them_too(kind):
    model = kinds.model(kind)
    unpacked = documents()
    ids, positions = pack(unpacked)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    out = compiled(ids, position_ids=positions, use_cache=False).logits
    assert_close(out, model(ids, position_ids=positions).logits)


# Without compiling, and compiled.
STANCES = ["force_eager", pytest.param("default", marks=[pytest.mark.whole, pytest.mark.compiler, pytest.mark.slow])]


@pytest.mark.parametrize("stance", STANCES)
@torch.no_grad()
def test_flex_attention(stance):
    # Blocks of 128 tokens: documents end inside and at the border of one.
    unpacked = [[torch.randint(3, kinds.VOCABULARY, (1, n), generator=torch.Generator().manual_seed(n))
                 for n in (100, 28, 40)]]  # fmt: skip
    ids, positions = pack(unpacked)
    for decoder in (True, False):
        model = build(decoder, "eager", layer_types="SF", sliding_window=30)
        expected = model(ids, position_ids=positions).last_hidden_state
        model.set_attn_implementation("flex_attention")
        with torch.compiler.set_stance(stance):
            assert_close(model(ids, position_ids=positions).last_hidden_state, expected)


@torch.no_grad()
def test_positions_counted_from_padding_start_after_it():
    fields = {"position_embedding_type": "learned", "position_ids_source": "input_ids", "pad_token_id": 1}
    unpacked = documents()
    ids, positions = pack(unpacked)
    for decoder in (True, False):
        model = build(decoder, **fields)
        expected = torch.cat([torch.cat([model(document).last_hidden_state for document in row], 1)
                              for row in unpacked])  # fmt: skip
        assert_close(model(ids, position_ids=positions + 2).last_hidden_state, expected)
        with pytest.raises(ValueError, match=r"`position_ids_source` input_ids counts from 2. Add 2 to them"):
            model(ids, position_ids=positions)


# What would leak is refused.


def test_a_mask_with_packed_documents_is_refused():
    model = build(True)
    ids, positions = pack(documents())
    mask = torch.ones_like(ids)
    for padding in (slice(0, 0), slice(0, 2), slice(-2, None)):
        mask[:, padding] = 0
        with pytest.raises(ValueError, match=r"with an `attention_mask` the documents see each other. Leave the mask"):
            model(ids, attention_mask=mask, position_ids=positions)


def test_an_encoder_goes_by_its_mask():
    """As the stock encoders: where positions restart, a mask of real tokens still says what is seen."""
    model = build(False)
    ids, positions = pack(documents())
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    seen = mask.bool()[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    with torch.no_grad():
        by_mask, alike, apart = (
            model(ids, attention_mask=given, position_ids=positions).last_hidden_state for given in (mask, seen, None)
        )
    torch.testing.assert_close(by_mask[:, :-2], alike[:, :-2])
    assert (by_mask - apart)[:, :-2].abs().max() > 1e-3


def test_a_cache_with_packed_documents_is_refused():
    model = build(True)
    ids, positions = pack(documents())
    with pytest.raises(ValueError, match=r"with `past_key_values` the documents see each other. Leave the cache out"):
        model(ids, position_ids=positions, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("decoder", [True, False])
def test_flash_attention_packs_one_row_only(decoder):
    model = build(decoder)
    # Not installed here, so that the forward would go no further.
    model.config._attn_implementation = "flash_attention_2"
    ids, positions = pack(documents())
    with pytest.raises(ValueError, match=r"in one row only. Flatten the rows"):
        model(ids, position_ids=positions)


@pytest.mark.parametrize("model_class", [VariantForSequenceClassification, VariantForQuestionAnswering])
@pytest.mark.parametrize("decoder", [True, False])
def test_one_answer_per_row_is_refused(decoder, model_class):
    model = build(decoder, model_class=model_class)
    ids, positions = pack(documents())
    with pytest.raises(ValueError, match=r"a row gets one (class|span). Give every document a row of its own"):
        model(ids, position_ids=positions)
    assert build(decoder, model_class=VariantForTokenClassification)(ids, position_ids=positions).logits.ndim == 3


@pytest.mark.tool("packing in a bare loop", package="transformers", refused=True)
@pytest.mark.parametrize("kind", ["seq2seq"])
def test_packed_pairs_are_refused(kind):
    model = kinds.model(kind)
    ids, positions = pack(documents())
    rows = torch.arange(ids.shape[1])[None]
    for given in ({"position_ids": positions}, {"decoder_position_ids": positions}):
        with pytest.raises(ValueError, match=r"cross-attention does not tell them apart. Give every document"):
            model(ids, decoder_input_ids=ids, **given)
    model(ids, decoder_input_ids=ids, position_ids=rows, decoder_position_ids=rows)


# What only looks like it goes on as before.


@torch.no_grad()
def test_other_position_ids_are_no_documents():
    ids, packed = pack(documents())
    rows = torch.arange(ids.shape[1])[None]
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 4:6] = mask[1, -2:] = 0
    counted = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    for decoder in (True, False):
        model = build(decoder)
        assert torch.equal(model(ids, position_ids=rows).last_hidden_state, model(ids).last_hidden_state)
        for positions in (rows, rows + 3, counted, counted.masked_fill(mask == 0, 77)):
            model(ids, attention_mask=mask, position_ids=positions)
        own = torch.ones(2, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        out = model(ids, attention_mask=own, position_ids=packed).last_hidden_state
        changed = ids.clone()
        changed[:, 0] = 3 + (ids[:, 0] - 2) % 90
        assert not torch.equal(model(changed, attention_mask=own, position_ids=packed).last_hidden_state[:, -1],
                               out[:, -1])  # fmt: skip


@pytest.mark.parametrize("decoder", [True, False])
@torch.no_grad()
def test_an_engine_with_requests_side_by_side_is_left_alone(decoder, monkeypatch):
    """It tells them apart by itself, and a look at the ids' values would wait for the device."""
    monkeypatch.setattr("hf_variants.model.modeling_variant.restarts", None)

    def engine(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        return query.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("packing engine", engine)
    model = build(decoder, "packing engine")
    ids, positions = pack(documents())
    model(ids, position_ids=positions, use_cache=False)

"""Every operation on every native type: it does what it says, or is refused in a sentence with a field or an option."""

from types import SimpleNamespace

import pytest
import torch

from hf_variants import surgery
from hf_variants.conversion import from_native
from hf_variants.conversion.opened_variant import open_variant
from hf_variants.surgery import Subject, observed
from hf_variants.surgery.positions import SCALINGS
from hf_variants.surgery.subject import APPROXIMATE, EXACTNESS, SAME_BITS
from tests.parity import inputs_of, logits_of, random_native, relative_error
from tests.surgery_models import ROWS
from tests.test_surgery_sizes import in_float64


# Those that the tests of single operations do not have, one of each kind.
QUICK = ("cohere2", "marian")
MARKS = {"gptj": (pytest.mark.whole,), "modernbert": (pytest.mark.whole,), **dict.fromkeys(QUICK, ())}
TYPES = [pytest.param(name, marks=MARKS.get(name, (pytest.mark.whole, pytest.mark.exhaustive))) for name in ROWS]
# Their attention is in float32, whatever the weights are.
BOUND = 1e-5
# In float32, on weights whose sums are ill-conditioned.
ROUNDING = 1e-4


class Tokens:
    """Stands for a tokenizer where an operation reads a text."""

    is_fast = True

    def __init__(self, subject):
        self.size = min(config.vocab_size for config in subject.stacks.values())

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=[(7 * place + 3) % (self.size - 4) + 3 for place in range(30)])


def operations(subject):
    """One of each kind, and where it goes two ways, both."""
    for stack, config in subject.stacks.items():
        last = config.num_hidden_layers - 1
        yield surgery.SelectLayers([0, last] if not config.first_layer_pre_norm else [last, 0], stack)
        yield surgery.GrowLayers([last, 0], stack)
        yield surgery.DropRotation([0], stack)
        yield surgery.DropLeastInfluential(1, "text", stack)
    config = list(subject.stacks.values())[-1]
    layer = config.per_layer_config[0]
    heads, shared, width = layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size
    for count in (1, heads):
        yield surgery.KeyValueHeads(count)
    for count in (heads + shared, max(1 if shared == heads else shared, heads // 2)):
        yield surgery.Heads(count, text="text")
    for size in (layer.head_dim * 2, layer.head_dim // 2):
        yield surgery.HeadSize(size)
    for size in (config.hidden_size * 2, config.hidden_size * 3 // 2, config.hidden_size // 2):
        yield surgery.HiddenSize(size, "text")
    for size in (width + 8, width // 2):
        yield surgery.FeedForwardWidth(size, text="text")
    yield surgery.ParameterCount(int(0.97 * sum(tensor.numel() for tensor in subject.stored.values())))
    yield from (surgery.Untie(), surgery.Tie(), surgery.Tie(force=True), surgery.PadVocabulary(16))
    yield from (surgery.ToEncoder(), surgery.ToEncoder("masked-lm"), surgery.DropHead(), surgery.ToClassifier(3))
    yield from (surgery.EncoderAlone(), surgery.ToEncoderDecoder(), surgery.ToEncoderDecoder("copy"))
    yield from (surgery.ToEmbedder(), surgery.ToEmbedder("last"))
    yield from (surgery.FuseNorms(), surgery.ToRMSNorm(), surgery.AddLayerScale())
    yield from (surgery.AddNorms("qk", "text"), surgery.AddNorms("sandwich", "text"))
    context = config.max_position_embeddings
    yield from (surgery.ContextLength(max(1, context // 2)), surgery.ContextLength(2 * context))
    for scaling in SCALINGS:
        yield surgery.ContextLength(2 * context, scaling)


def outcome_of(operation, subject):
    """The next subject, or why there is none: in the operation's words, or in a check's of the config."""
    try:
        after = operation.apply(subject)
    except ValueError as error:
        return str(error)
    after.headers()
    return after


@pytest.mark.parametrize("model_type", TYPES)
def test_operations_do_what_they_say_or_are_refused_in_a_sentence(model_type, monkeypatch):
    monkeypatch.setattr(observed, "tokenizer_data", SimpleNamespace(load=Tokens))
    row = ROWS[model_type]
    native = random_native(row, 1)
    model = in_float64(from_native(native).double())
    subject = Subject.of_model(model)
    batch = inputs_of(native, row.length)["long"]
    before = logits_of(model, batch)
    done = 0
    for operation in operations(subject):
        after = outcome_of(operation, subject)
        if isinstance(after, str):
            # What is in the way, and the way out.
            assert "`" in after, f"{operation}: {after}"
            assert after.count(". ") >= 1, f"{operation}: {after}"
            continue
        made = in_float64(after.model())
        done += 1
        new = after.outcomes[len(subject.outcomes) :]
        exactness = max((outcome.exactness for outcome in new), key=EXACTNESS.index)
        short = {name: ids[:, :4] for name, ids in batch.items() if name.endswith("input_ids")}
        if made.config.is_encoder_decoder:
            short.setdefault("decoder_input_ids", short["input_ids"])
        elif "decoder_input_ids" in short:
            del short["decoder_input_ids"]
        if isinstance(operation, surgery.ContextLength) or type(made) is not type(model):
            comparable = type(made) is type(model)
            outputs = made(**short, attention_mask=torch.ones_like(short["input_ids"]))
            assert outputs[0].isfinite().all(), operation
            if comparable and exactness != APPROXIMATE:
                assert torch.equal(logits_of(made, short), logits_of(model, short)), operation
            continue
        logits = logits_of(made, batch)[..., : before.shape[-1]]
        if exactness == SAME_BITS and not isinstance(operation, surgery.PadVocabulary):
            assert torch.equal(logits, before), operation
        elif exactness != APPROXIMATE:
            assert relative_error(logits, before) < BOUND, operation
    assert done > 15


@pytest.mark.parametrize("model_type", TYPES)
def test_operations_of_one_call_keep_the_function_of_the_native_class(model_type, tmp_path):
    row = ROWS[model_type]
    native = random_native(row, 1)
    native.save_pretrained(tmp_path / "native")
    subject = Subject.of(open_variant(tmp_path / "native"))
    wanted: list = []
    for stack, config in subject.stacks.items():
        layer = config.per_layer_config[0]
        wanted += [surgery.GrowLayers("0", stack), surgery.KeyValueHeads(layer.num_attention_heads, stack)]
        wanted.append(surgery.FeedForwardWidth(layer.intermediate_size + 8, stack=stack))
    wanted += [surgery.PadVocabulary(16), surgery.Untie()]
    possible = []
    for operation in wanted:
        after = outcome_of(operation, subject)
        if isinstance(after, str):
            assert "`" in after
            continue
        subject = after
        possible.append(operation)
    report = surgery.edit(tmp_path / "native", tmp_path / "ours", possible, native=tmp_path / "back")
    assert report.exactness != APPROXIMATE
    assert report.difference.relative < ROUNDING
    if isinstance(report.native, str):
        assert "`" in report.native
        return
    stock, made = (type(native).from_pretrained(tmp_path / name).eval() for name in ("native", "back"))
    batch = inputs_of(native, row.length)["long"] | ({"use_cache": False} if native.can_generate() else {})
    before = logits_of(stock, batch)
    assert relative_error(logits_of(made, batch)[..., : before.shape[-1]], before) < ROUNDING

"""For every native type and head: the layouts that stock transformers loads we load, to the same bits."""

import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hf_variants.conversion import ConversionError, convert, export, verify
from hf_variants.conversion.family import all_families
from tests.layouts import FILES, LAYOUTS, OF_TIES, differences, native_of, saved, tied_native_of, write


# Types that between them have every kind: renamed and fused tensors, tables, ties, poolers, one stack and two.
SAMPLE = ("bert", "gpt_neox", "t5", "bart", "llama", "gpt2", "nomic_bert", "marian")


def loads_as_stock(model, tensors, layout, folder, rng):
    """Whether stock loads this layout, which must then give the same model here."""
    made = layout(model, tensors, rng)
    if made is None:
        return False
    file = rng.choice(FILES)
    different = differences(write(folder, model, made, file), model)
    shutil.rmtree(folder)
    assert not different, (layout.__name__, file, different)
    return different is not None


def check_names_of_exports(folder, model, tensors):
    convert(folder / "saved", folder / "variant")
    report = export(folder / "variant", folder / "back", model_type=model.config.model_type)
    made = load_file(folder / "back" / "model.safetensors")
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[name], tensors[name]) for name in made)
    assert report.tensors == len(made)


def check_head(model_type, head, layouts, folder):
    """The layouts among these that stock loads."""
    rng = random.Random(f"{model_type}-{head}")
    model = native_of(model_type, head)
    tensors = saved(model, folder / "saved")
    check_names_of_exports(folder, model, tensors)
    tied = tied_native_of(model_type, head) if any(layout in OF_TIES for layout in layouts) else None
    loaded = [
        layout
        for layout in layouts
        if layout not in OF_TIES and loads_as_stock(model, tensors, layout, folder / "old", rng)
    ]
    if tied is not None:
        tensors = saved(tied, folder / "tied")
        loaded += [
            layout
            for layout in layouts
            if layout in OF_TIES and loads_as_stock(tied, tensors, layout, folder / "old", rng)
        ]
    return loaded


def test_a_sample_of_types_and_every_layout(tmp_path):
    loaded = set()
    for number, model_type in enumerate(SAMPLE):
        heads = all_families()[model_type].converted_heads
        layouts = LAYOUTS[number % 4 :: 4]
        loaded |= set(check_head(model_type, heads[number % len(heads)], layouts, tmp_path / model_type))
    assert len(loaded) > 12


@pytest.mark.whole
@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", list(all_families()))
def test_every_head_and_layout(model_type, tmp_path):
    for head in all_families()[model_type].converted_heads:
        loaded = check_head(model_type, head, LAYOUTS, tmp_path / head)
        # Among them files, dtypes and buffers, which no class can refuse.
        assert len(loaded) > 5


def test_a_base_without_a_pooler_is_verified(tmp_path):
    model = native_of("bert", "base")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("pooler")}
    write(tmp_path / "native", model, tensors)
    convert(tmp_path / "native", tmp_path / "variant")
    assert verify(tmp_path / "native", tmp_path / "variant", progress=False).ok


@pytest.mark.parametrize(
    ("model_type", "head"), [("llama", "causal_lm"), ("gpt2", "causal_lm"), ("bert", "base"), ("t5", "seq2seq_lm")]
)
@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "student.net."])
def test_a_module_around_the_model_is_named(model_type, head, wrapper, tmp_path):
    model = native_of(model_type, head)
    tensors = saved(model, tmp_path / "saved")
    write(tmp_path / "native", model, {wrapper + name: tensor for name, tensor in tensors.items()})
    # Stock starts all of them afresh.
    _, info = type(model).from_pretrained(tmp_path / "native", output_loading_info=True)
    assert tensors.keys() <= set(info["missing_keys"])
    with pytest.raises(ConversionError, match=re.escape(f"the model's tensors under {wrapper!r}")):
        convert(tmp_path / "native", tmp_path / "variant")
    assert not (tmp_path / "variant").exists()

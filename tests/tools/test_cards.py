"""The model card that each kind of variant is saved with: metadata as huggingface_hub reads it, sizes, a drawing."""

import re
from xml.etree import ElementTree

import pytest
from huggingface_hub import EvalResult, ModelCard

from hf_variants.card import CARD, DRAWING, write_card
from tests.tools import kinds
from tests.tools.kinds import DECODERS, KINDS


TASKS = {**dict.fromkeys((*DECODERS, "seq2seq"), "text-generation"), "encoder": "fill-mask"}
STACKS = {"seq2seq": 2}


@pytest.mark.tool("Hub: model card", package="huggingface_hub")
@pytest.mark.parametrize("kind", KINDS)
def test_card(kind, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    kinds.tokenizer().save_pretrained(folder)
    model = kinds.model(kind)
    model.save_pretrained(folder)
    result = EvalResult(
        task_type=TASKS[kind], dataset_type="d", dataset_name="D", metric_type="accuracy", metric_value=0.5
    )
    write_card(folder, license="apache-2.0", base_model="someone/base", datasets=["d"], eval_results=[result])
    card = ModelCard.load(folder / CARD)
    assert card.data.pipeline_tag == TASKS[kind]
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("apache-2.0", "someone/base", ["d"])
    assert card.data.eval_results == [result]
    assert f"| parameters | {model.num_parameters():,} |" in card.text
    frames = [shape for shape in ElementTree.parse(folder / DRAWING).iter() if shape.get("class") == "frame"]
    assert len(frames) == STACKS.get(kind, 1)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    # With the package; tests/test_card.py runs such code without.
    exec(code, {})
    assert capsys.readouterr().out.strip()

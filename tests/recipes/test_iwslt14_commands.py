"""The recipe on the command line: variants, and what is done with a trained model."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_memtrain.recipes.iwslt14_dynamicconv as recipe
from lightning_memtrain.cli import main
from lightning_memtrain.recipes.iwslt14_dynamicconv import checkpoints, text
from lightning_memtrain.recipes.iwslt14_dynamicconv import fairseq_bridge as bridge
from lightning_memtrain.recipes.iwslt14_dynamicconv.module import TranslationModule
from tests.helpers.cli import IGNORED
from tests.helpers.translation import TINY, needs_fairseq, write_corpus

pytestmark = pytest.mark.filterwarnings(
    *IGNORED, "ignore:Checkpoint directory .* exists", "ignore:.*dataloader, does not have"
)
VARIANTS = sorted((Path(recipe.__file__).parent / "variants").glob("*.yaml"))
# The recipe in seconds.
SMALL = [
    f"--model.options={yaml.safe_dump(TINY, default_flow_style=True, width=10_000).strip()}",
    "--model.warmup_steps=5",
    "--model.max_len_b=12",
    "--data.max_tokens=80",
    "--data.download=false",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_val_batches=0",
]
RUN = [
    "run",
    "iwslt14_dynamicconv",
    "--trainer.callbacks=[]",
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.save_top_k=-1",
    "--trainer.callbacks.every_n_train_steps=2",
    "--trainer.max_steps=6",
    *SMALL,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_corpus(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["memtrain"])
        patch.setenv("MEMTRAIN_RUN_DIR", "")
        assert main([*RUN, f"--data.data_dir={data}", f"--run-dir={folder / 'run'}"]) == 0
    return folder / "run"


def error_of(capsys: pytest.CaptureFixture[str], code: int, *args: str) -> str:
    capsys.readouterr()
    assert main(args) == code
    lines = capsys.readouterr().err.splitlines()
    return lines[-1].removeprefix("memtrain: error: ")


def test_every_variant_is_tested_here() -> None:
    names = [path.stem for path in VARIANTS]
    assert names == ["all", "baseline", "bf16", "checkpointed", "microbatched", "multi30k", "sparse"]


@needs_fairseq
@pytest.mark.parametrize("variant", [path.stem for path in VARIANTS])
def test_a_variant_is_read(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "iwslt14_dynamicconv", f"--variant={variant}", "--print_config"])
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert names[:2] == ["MemoryProfiler", "ModelCheckpoint"]
    added = {
        "all": ["ActivationCheckpointing", "SparseTraining", "Microbatching"],
        "sparse": ["SparseTraining"],
        "microbatched": ["Microbatching"],
        "checkpointed": ["ActivationCheckpointing"],
    }
    assert names[2:] == added.get(variant, [])
    assert bool(config["trainer"]["plugins"]) == (variant in ("all", "bf16"))
    options = config["model"]["init_args"]
    assert options["options"]["dropout"] == (0.1 if variant == "multi30k" else 0.3)
    assert (options["loss_chunk"] is None) == (variant == "baseline")


@needs_fairseq
def test_variants_are_laid_over_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "iwslt14_dynamicconv", "--variant=multi30k", "--variant=all", "--print_config"])
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    callbacks = config["trainer"]["callbacks"]
    assert [callback["class_path"].rpartition(".")[2] for callback in callbacks] == [
        *("MemoryProfiler", "ModelCheckpoint", "ActivationCheckpointing", "SparseTraining", "Microbatching")
    ]
    assert callbacks[1]["init_args"]["every_n_train_steps"] == 25  # of the first
    assert config["model"]["init_args"]["options"]["encoder_embed_dim"] == 256
    assert config["model"]["init_args"]["loss_chunk"] == 128  # of the second
    assert config["data"]["class_path"].endswith(".Multi30kDataModule")
    assert config["trainer"]["plugins"]


@needs_fairseq
@pytest.mark.parametrize(
    "option", [["--data=multi30k"], ["--data", "Multi30k"], ["--data=Multi30kDataModule"]]
)
def test_a_data_module_goes_by_its_short_name(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "iwslt14_dynamicconv", "--variant=all", *option, "--data.seed=7", "--print_config"])
    assert ended.value.code == 0
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["class_path"] == f"{recipe.__name__}.data.Multi30kDataModule"
    assert (data["init_args"]["seed"], data["init_args"]["max_tokens"]) == (7, 4000)


@needs_fairseq
def test_a_mistyped_short_name(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, 2, "run", "iwslt14_dynamicconv", "--data=multi3k")
    assert message == "`--data`: there is no class `multi3k`. Did you mean `multi30k`?"


@needs_fairseq
def test_translate_prints_a_line_per_sentence(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["translate", str(trained), "Wort1 wort2", "", "wort3"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 4
    assert lines[1] == lines[3] == ""


@needs_fairseq
def test_translate_reads_stdin(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"wort1 wort2\nwort3\n")))
    assert main(["translate", str(trained), "--tokenized", "--average=2"]) == 0
    from_stdin = capsys.readouterr().out.splitlines()
    assert len(from_stdin) == 2
    assert main(["translate", str(trained), "--tokenized", "--average=2", "wort1 wort2", "wort3"]) == 0
    assert capsys.readouterr().out.splitlines() == from_stdin
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("schön".encode("latin-1"))))
    message = error_of(capsys, 1, "translate", str(trained))
    assert message.startswith("the sentences on stdin must be UTF-8, but are not")


@needs_fairseq
def test_translate_splits_stdin_as_files_are_split(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = "wort1\u2028wort2\nwort3\x85wort4\x0bwort5\x0cwort6\r\nwort7\n".encode()
    (tmp_path / "file").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    capsys.readouterr()
    assert main(["translate", str(trained), "--tokenized"]) == 0
    from_stdin = capsys.readouterr().out.split("\n")
    assert len(from_stdin) == 4
    assert main(["translate", str(trained), "--tokenized", *text.read_lines(tmp_path / "file")]) == 0
    assert capsys.readouterr().out.split("\n") == from_stdin


@needs_fairseq
def test_score_prints_bleu_twice_and_writes_translations(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", str(trained), f"--output={tmp_path / 'out'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("test/bleu ") for line in lines)
    assert any(line.startswith("sacrebleu ") and "tok:none" in line for line in lines)
    assert len((tmp_path / "out").read_text().splitlines()) == 10
    message = error_of(capsys, 1, "score", str(trained), f"--data-dir={tmp_path}")
    assert "was not found in" in message


@needs_fairseq
def test_scored_translations_are_in_the_order_of_the_test_set(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    translate = TranslationModule.translate_sample

    def repeat(self: TranslationModule, sample: bridge.Sample) -> list[tuple[str, str, str]]:
        """The source for a translation, since those of a model that has learnt nothing are alike."""
        return [(source, source, reference) for source, _, reference in translate(self, sample)]

    monkeypatch.setattr(TranslationModule, "translate_sample", repeat)
    assert main(["score", str(trained), f"--output={tmp_path / 'out'}"]) == 0
    sources = text.read_lines(trained.parent / "data" / "test.de")
    capsys.readouterr()
    assert main(["translate", str(trained), "--tokenized", *sources]) == 0
    assert text.read_lines(tmp_path / "out") == capsys.readouterr().out.splitlines()
    lengths = [len(source.split()) for source in sources]
    assert lengths != sorted(lengths)


@needs_fairseq
def test_the_mean_of_checkpoints(trained: Path) -> None:
    paths = checkpoints.last_checkpoints(trained, 2)
    assert [torch.load(path, weights_only=True)["global_step"] for path in paths] == [4, 6]
    mean = checkpoints.load_mean(paths).state_dict()
    states = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    assert all(torch.equal(mean[name], (states[0][name] + states[1][name]) / 2) for name in mean)
    assert not torch.equal(
        states[0]["model.encoder.embed_tokens.weight"], mean["model.encoder.embed_tokens.weight"]
    )


@needs_fairseq
def test_a_sparse_run_is_translated_and_scored_by_the_mean_of_its_dense_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_corpus(tmp_path / "data")
    sparse = {
        "class_path": "lightning_memtrain.SparseTraining",
        "init_args": {
            "method": {"class_path": "lightning_memtrain.sparsity.SET", "init_args": {"sparsity": 0.8}},
            "update": {"class_path": "lightning_memtrain.sparsity.UpdateEvery", "init_args": {"steps": 1}},
            "layers": {
                "class_path": "lightning_memtrain.sparsity.Select",
                "init_args": {"dense": ["*.weight_linear", "*.output_projection"]},
            },
        },
    }
    monkeypatch.setattr("sys.argv", ["memtrain"])
    monkeypatch.setenv("MEMTRAIN_RUN_DIR", "")
    added = f"--trainer.callbacks+={json.dumps(sparse)}"
    assert main([*RUN, added, f"--data.data_dir={data}", f"--run-dir={tmp_path / 'run'}"]) == 0
    paths = checkpoints.last_checkpoints(tmp_path / "run", 3)
    states = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    layer = "model.decoder.layers.0.fc1"
    patterns = [state[f"{layer}.sparsity_pattern"] for state in states]
    assert not torch.equal(patterns[0], patterns[2]), "nothing has moved"
    dense = [TranslationModule.load_from_checkpoint(path).state_dict() for path in paths]
    weight, values = dense[0][f"{layer}.weight"], states[0][f"{layer}.values"]
    assert torch.equal(weight[weight != 0], values[values != 0])  # what has just grown is 0
    mean = checkpoints.load_mean(paths).state_dict()
    assert mean.keys() == dense[0].keys()
    assert all(
        torch.equal(mean[name], (dense[0][name] + dense[1][name] + dense[2][name]) / 3) for name in mean
    )
    capsys.readouterr()
    assert main(["translate", str(tmp_path / "run"), "--tokenized", "wort1 wort2", "wort3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["score", str(tmp_path / "run"), f"--output={tmp_path / 'out'}"]) == 0
    assert len((tmp_path / "out").read_text().splitlines()) == 10


@needs_fairseq
def test_nothing_that_hyper_parameters_name_is_imported_or_called(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Lightning before 2.6.6 would do both; this module does nothing.
    (tmp_path / "never_imported.py").write_text("def make(*args, **kwargs): raise AssertionError('called')")
    monkeypatch.syspath_prepend(tmp_path)
    (last,) = checkpoints.last_checkpoints(trained, 1)
    checkpoint = torch.load(last, weights_only=True)
    parameters = checkpoint["hyper_parameters"]
    assert parameters["_class_path"] == f"{recipe.__name__}.module.TranslationModule"
    parameters["_instantiator"] = "never_imported.make"
    named = tmp_path / "named.ckpt"
    torch.save(checkpoint, named)
    for file in (last, named):
        assert main(["translate", str(trained), "wort1", "--tokenized", f"--checkpoint={file}"]) == 0
    one, other = capsys.readouterr().out.splitlines()
    assert one == other
    parameters["_class_path"] = "never_imported.Model"
    torch.save(checkpoint, named)
    message = error_of(capsys, 1, "translate", str(trained), "wort1", f"--checkpoint={named}")
    assert message.startswith("the checkpoint is of a `never_imported.Model`, which is no `")
    assert "never_imported" not in sys.modules


@needs_fairseq
def test_a_class_that_extends_the_model_is_found(trained: Path, tmp_path: Path) -> None:
    class Extended(TranslationModule):
        pass

    (last,) = checkpoints.last_checkpoints(trained, 1)
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = f"{__name__}.{Extended.__qualname__}"
    torch.save(checkpoint, tmp_path / "extended.ckpt")
    assert type(checkpoints.load_mean([tmp_path / "extended.ckpt"])) is Extended


@needs_fairseq
def test_mistakes_are_answered_by_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text((trained / "config.yaml").read_text())
    message = error_of(capsys, 1, "translate", str(tmp_path / "empty"), "wort1")
    assert message.startswith("there is no checkpoint in `")
    message = error_of(capsys, 1, "translate", str(trained), "wort1", "--checkpoint=nowhere.ckpt")
    assert message == "there is no checkpoint `nowhere.ckpt`."
    (tmp_path / "bad.ckpt").write_text("no checkpoint")
    message = error_of(capsys, 1, "translate", str(trained), "wort1", f"--checkpoint={tmp_path / 'bad.ckpt'}")
    assert "cannot be read as a checkpoint" in message
    message = error_of(capsys, 1, "translate", str(trained), "wort1 wort2 wort3", "--max-tokens=3")
    assert message.startswith("a sentence must have at most --max-tokens=3 tokens, but number 1 has 4.")
    assert error_of(capsys, 2, "translate", str(trained), "--average=0", "a").startswith("--average must be")
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    message = error_of(capsys, 2, "translate", str(trained), "wort1")
    assert message.startswith(
        "Preparing text needs sacremoses, which is not installed. Install it: pip install"
    )


def test_a_command_needs_a_run_of_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no run folder: it does not exist" in error_of(capsys, 2, "translate", str(tmp_path / "no"))
    path = "lightning_memtrain.recipes.cifar10_wrn28_2.data.X"
    (tmp_path / "config.yaml").write_text(f"data:\n  class_path: {path}\n")
    message = error_of(capsys, 2, "translate", str(tmp_path), "a")
    assert message.startswith("`memtrain translate` needs a run of `iwslt14_dynamicconv`, but")
    assert message.endswith("is a run of `cifar10_wrn28_2`.")
    message = "`memtrain translate` needs the folder of a run before its options."
    assert error_of(capsys, 2, "translate") == error_of(capsys, 2, "translate", "--average=2") == message


def test_without_fairseq_a_run_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bridge, "find_spec", lambda name: None)
    bridge.load.cache_clear()
    message = error_of(capsys, 2, "run", "iwslt14_dynamicconv", f"--run-dir={tmp_path / 'run'}")
    assert "needs fairseq, which is not installed" in message
    assert "pip install 'lightning-memtrain[translation]'" in message

"""Where the benchmark of the translation recipe's memory takes its batches from."""

from __future__ import annotations

import lzma
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import iwslt14_memory as benchmark
from lightning_memtrain.recipes.iwslt14_dynamicconv.data import load_dictionaries
from lightning_memtrain.recipes.iwslt14_dynamicconv.text import read_lines
from tests.helpers.translation import needs_fairseq, write_corpus

pytestmark = needs_fairseq


@pytest.mark.parametrize("packed", [True, False])
def test_statistics_make_the_batches_of_the_prepared_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    folder = write_corpus(tmp_path / "data" / "iwslt14.tokenized.de-en")
    load_dictionaries(folder)  # writes them
    statistics = tmp_path / "statistics"
    statistics.mkdir()
    sides = {
        side: [len(line.split()) + 1 for line in read_lines(folder / f"train.{side}")]
        for side in ("de", "en")
    }
    np.savez(statistics / "lengths.npz", **{side: np.array(n, dtype=np.uint8) for side, n in sides.items()})
    for side in sides:
        content = (folder / f"dict.{side}.txt").read_bytes()
        if packed:
            (statistics / f"dict.{side}.txt.xz").write_bytes(lzma.compress(content))
        else:
            (statistics / f"dict.{side}.txt").write_bytes(content)
    monkeypatch.setenv("MEMTRAIN_DATA_DIR", str(tmp_path / "data"))
    samples = [
        benchmark.make_sample(workload, (8, 6, 6), max_tokens=80)
        for workload in (
            benchmark.of_prepared_text(None),
            benchmark.of_prepared_text(str(folder)),
            benchmark.of_statistics(statistics / "lengths.npz", statistics),
        )
    ]
    for sample in samples:
        assert sample["ntokens"] == samples[0]["ntokens"] > 0
        assert torch.equal(sample["id"], samples[0]["id"])
        assert torch.equal(sample["target"], samples[0]["target"])
        assert torch.equal(sample["net_input"]["src_tokens"], samples[0]["net_input"]["src_tokens"])


def test_the_true_lengths_make_the_batch_that_is_reported(true_text: Path) -> None:
    folder = true_text / "iwslt14"
    workload = benchmark.of_statistics(folder / "train_lengths.npz", folder)
    sample = benchmark.make_sample(workload, benchmark.BATCHES["typical"])
    assert sample["net_input"]["src_tokens"].shape == (120, 32)
    assert sample["net_input"]["prev_output_tokens"].shape == (120, 31)
    assert sample["ntokens"] == 3_698


def test_text_that_is_not_there_is_named_with_the_cure(tmp_path: Path) -> None:
    message = (
        rf"is in none of {re.escape(str(tmp_path))}, .*lightning_memtrain. Start `memtrain run iwslt14_dyn"
    )
    with pytest.raises(SystemExit, match=message):
        benchmark.of_prepared_text(str(tmp_path))


def test_lengths_and_dictionaries_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", "--lengths=here.npz"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "--lengths and --dictionaries go together." in capsys.readouterr().err

"""Where the data is looked for, what the data modules yield, and what they refuse."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_memtrain.recipes.cifar10_wrn28_2 import data as data_module
from lightning_memtrain.recipes.cifar10_wrn28_2.data import (
    CIFAR10DataModule,
    DigitsDataModule,
    obtain_cifar10,
)

NOWHERE = "http://127.0.0.1:9/cifar-10-python.tar.gz"  # port 9 discards; nothing listens there


def small(data_dir: Path | None, **options: object) -> CIFAR10DataModule:
    arguments = {"batch_size": 4, "num_val_images": 10, "download": False, **options}
    return CIFAR10DataModule(None if data_dir is None else str(data_dir), **arguments)  # type: ignore[arg-type]


def test_reads_train_validation_and_test(mini_cifar10: Path) -> None:
    data = small(mini_cifar10)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    train = list(data.train_dataloader())
    assert [tuple(images.shape) for images, _ in train] == [(4, 3, 32, 32)] * 7  # 30 images, and 2 left out
    assert all(images.dtype == torch.float32 and labels.dtype == torch.int64 for images, labels in train)
    assert [len(labels) for _, labels in data.val_dataloader()] == [4, 4, 2]
    assert [len(labels) for _, labels in data.test_dataloader()] == [4, 4]
    everything = data.read(train=True)
    assert everything.images.shape == (40, 3, 32, 32)
    held_out = torch.cat([labels for _, labels in data.val_dataloader()])
    kept = data._sets["train"].labels
    assert torch.equal(
        torch.cat([kept, held_out]).bincount(minlength=10), everything.labels.bincount(minlength=10)
    )


def test_the_hold_out_depends_on_the_seed_only(mini_cifar10: Path) -> None:
    def held_out(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 1)
        data = small(mini_cifar10, seed=seed)
        data.setup("validate")
        return torch.cat([images for images, _ in data.val_dataloader()])

    assert torch.equal(held_out(0), held_out(0))
    assert not torch.equal(held_out(0), held_out(1))


def test_without_held_out_images_there_is_no_validation(mini_cifar10: Path) -> None:
    data = small(mini_cifar10, num_val_images=0)
    data.setup("fit")
    assert len(data.train_dataloader()) == 10
    assert data.val_dataloader() == []


def test_the_folder_itself_will_do(mini_cifar10: Path) -> None:
    assert len(small(mini_cifar10 / "cifar-10-batches-py").read(train=False).labels) == 8


def test_the_environment_variable_comes_after_data_dir(
    mini_cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMTRAIN_DATA_DIR", str(mini_cifar10))
    assert len(small(None).read(train=False).labels) == 8
    assert len(small(tmp_path / "empty").read(train=False).labels) == 8
    monkeypatch.setenv("MEMTRAIN_DATA_DIR", str(tmp_path / "empty"))
    assert len(small(mini_cifar10).read(train=False).labels) == 8


def test_missing_data_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMTRAIN_DATA_DIR", str(tmp_path / "two"))
    data = small(tmp_path / "one")
    message = (
        rf"CIFAR-10 was not found in `{tmp_path}/one`, `{tmp_path}/two`, `.*/.cache/lightning_memtrain`, and "
        r"a download was not asked for: pass a `data_dir` that holds the folder `cifar-10-batches-py`, "
        r"or name such a folder in \$MEMTRAIN_DATA_DIR\.$"
    )
    for call in (data.prepare_data, lambda: data.setup("fit")):
        with pytest.raises(FileNotFoundError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_offline_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "CIFAR10_URL", NOWHERE)
    with pytest.raises(
        FileNotFoundError, match=rf"`{tmp_path}`.*the download from {NOWHERE} failed \(.*refused.*\): pass"
    ):
        small(tmp_path, download=True).prepare_data()


@pytest.fixture
def archive(mini_cifar10: Path, tmp_path: Path) -> Path:
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(mini_cifar10 / "cifar-10-batches-py", "cifar-10-batches-py")
    return path


def test_downloads_and_unpacks_into_the_first_place(archive: Path, tmp_path: Path, server: Any) -> None:
    server.content = archive.read_bytes()
    sha256 = hashlib.sha256(server.content).hexdigest()
    places = [tmp_path / "first", tmp_path / "second"]
    folder = obtain_cifar10(places, server.url, sha256=sha256)
    assert folder == tmp_path / "first" / "cifar-10-batches-py"
    assert len(list(folder.iterdir())) == 6
    left = {path.name for path in (tmp_path / "first").iterdir()}
    assert left == {"cifar-10-batches-py", ".CIFAR-10.lock"}
    assert obtain_cifar10(places, server.url, sha256=sha256) == folder
    assert len(server.asked_for) == 1  # found, not downloaded again


def test_a_wrong_archive_is_named(archive: Path, tmp_path: Path, server: Any) -> None:
    server.content = archive.read_bytes()
    sha256 = hashlib.sha256(server.content).hexdigest()
    message = rf"the download from .* failed \(SHA256 hash of .* expected {'0' * 64} but got {sha256}\."
    with pytest.raises(FileNotFoundError, match=message) as caught:
        obtain_cifar10([tmp_path / "first"], server.url, sha256="0" * 64)
    assert "\n" not in str(caught.value)


def test_digits_are_images_like_those_of_cifar10() -> None:
    data = DigitsDataModule()
    data.setup("fit")
    data.setup("test")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (100, 3, 32, 32)
    assert len(data.train_dataloader()) == 12  # 1,237 images
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 200
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 360
    assert labels.unique().tolist() == list(range(10))
    everything = torch.cat([data.read(train=True).images, data.read(train=False).images]).float() / 255
    assert len(everything) == 1_797
    assert everything.mean().item() == pytest.approx(data.mean[0], abs=1e-4)
    assert everything.std().item() == pytest.approx(data.std[0], abs=1e-4)
    assert torch.equal(everything[:, 0], everything[:, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"`DigitsDataModule\(batch_size\)` must be at least 1, but got batch_size=0"),
        (
            {"num_val_images": -1},
            r"`DigitsDataModule\(num_val_images\)` must be at least 0, but got num_val_images=-1",
        ),
        (
            {"num_workers": -1},
            r"`DigitsDataModule\(num_workers\)` must be at least 0, but got num_workers=-1",
        ),
        ({"seed": -1}, r"`DigitsDataModule\(seed\)` must be at least 0, but got seed=-1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**arguments)


@pytest.mark.parametrize(("batch_size", "num_processes"), [(31, 1), (16, 2)])
def test_a_batch_that_cannot_be_filled_is_refused(
    mini_cifar10: Path, batch_size: int, num_processes: int
) -> None:
    data = small(mini_cifar10, batch_size=batch_size)
    data.trainer = SimpleNamespace(world_size=num_processes)  # type: ignore[assignment]
    message = (
        rf"at least one full batch for each process, but batch_size={batch_size} and num_val_images=10 were "
        rf"asked of 40 training images and {num_processes} process"
    )
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_the_real_images_have_the_mean_and_deviation_that_they_are_normalised_by(cifar10_dir: Path) -> None:
    data = CIFAR10DataModule(str(cifar10_dir), download=False)
    images, labels = data.read(train=True)
    assert images.shape == (50_000, 3, 32, 32)
    assert labels.bincount().tolist() == [5_000] * 10
    pixels = images[::7].float() / 255
    for channel in range(3):
        assert pixels[:, channel].mean().item() == pytest.approx(data.mean[channel], abs=0.01)
        assert pixels[:, channel].std().item() == pytest.approx(data.std[channel], abs=0.01)

from __future__ import annotations

import pytest

from lightning_memtrain.core import GIB, MIB
from lightning_memtrain.tracing.allocator import AllocatorSettings


def test_a_configuration_is_read_as_torch_reads_it() -> None:
    settings = AllocatorSettings.parse("expandable_segments:True, max_split_size_mb:128,pinned_use_x:True")
    assert settings == AllocatorSettings(expandable_segments=True, max_split_size_bytes=128 * MIB)
    assert AllocatorSettings.parse("") == AllocatorSettings()
    assert AllocatorSettings.parse("backend:native") == AllocatorSettings()


def test_divisions_of_powers_of_two_round_up() -> None:
    settings = AllocatorSettings.parse("roundup_power2_divisions:4")
    # Torch's own example, with MiB for bytes: between 1024 and 2048 the steps are 1024, 1280, 1536 and 1792.
    assert settings.block_bytes(1200 * MIB) == 1280 * MIB
    assert settings.block_bytes(1280 * MIB) == 1280 * MIB
    assert settings.block_bytes(1281 * MIB) == 1536 * MIB
    assert settings.block_bytes(2000) == 2048  # too small for four steps of 512 bytes
    assert settings.block_bytes(2100) == 2560
    assert settings.block_bytes(2**40 + 1) == 2**40 + 2**38  # as if it were 32 GiB


def test_divisions_can_depend_on_the_size() -> None:
    settings = AllocatorSettings.parse("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]")
    assert settings.block_bytes(200 * MIB + 1) == 200 * MIB + 512
    assert settings.block_bytes(600 * MIB) == 768 * MIB
    assert settings.block_bytes(1200 * MIB) == 1280 * MIB
    assert settings.block_bytes(2 * GIB + 1) == 2 * GIB + 256 * MIB


def test_the_settings_in_a_snapshot_are_read() -> None:
    recorded = {
        "PYTORCH_CUDA_ALLOC_CONF": "",
        "max_split_size": -1,
        "garbage_collection_threshold": 0.0,
        "expandable_segments": True,
        "roundup_power2_divisions": {"1": 0, "2": 4},
    }
    settings = AllocatorSettings.from_snapshot(recorded)
    assert settings == AllocatorSettings(True, None, ((2 * MIB, 4),))
    assert AllocatorSettings.from_snapshot({}) == AllocatorSettings()


def test_what_is_not_modelled_is_left_out_and_said() -> None:
    recorded = {"expandable_segments": True, "garbage_collection_threshold": 0.8}
    settings, missing = AllocatorSettings.nearest(recorded)
    assert settings == AllocatorSettings(expandable_segments=True)
    assert missing.startswith("garbage_collection_threshold=0.8 changes when torch takes")
    assert AllocatorSettings.nearest({}) == (AllocatorSettings(), "")


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ("garbage_collection_threshold:0.8", r"garbage_collection_threshold=0\.8 changes when"),
        ("large_segment_size_mb:64", r"large_segment_size_mb=64 changes when"),
        ("max_split_size_mb:20", r"must be more than 20,971,520 \(20 MiB\)"),
        ("max_split_size_mb:many", r"invalid literal for int\(\).*'many'"),
        ("expandable_segments:yes", r"wrong: 'yes'"),
        ("roundup_power2_divisions:3", r"0 or a power of two, but got \(1048576, 3\)"),
    ],
)
def test_what_is_not_modelled_or_not_torchs_is_refused(configuration: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AllocatorSettings.parse(configuration)


def test_divisions_are_of_powers_that_torch_knows() -> None:
    with pytest.raises(ValueError, match=r"1 MiB to 32 GiB, in bytes, .* but got \(3, 4\)"):
        AllocatorSettings(roundup_power2_divisions=((3, 4),))


def test_what_is_only_in_the_text_of_a_snapshot_is_seen() -> None:
    text = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True, max_non_split_rounding_mb: 64"}
    recorded = {**text, "expandable_segments": True, "max_split_size": 2**64 - 1}
    settings, missing = AllocatorSettings.nearest(recorded)
    assert settings == AllocatorSettings(expandable_segments=True)
    assert missing.startswith("max_non_split_rounding_mb=64 changes when torch takes")
    by_default = {"PYTORCH_ALLOC_CONF": "large_segment_size_mb:20,garbage_collection_threshold:0"}
    assert AllocatorSettings.nearest(by_default) == (AllocatorSettings(), "")

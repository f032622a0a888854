"""Manifests, with hashlib as the oracle."""

import hashlib
import json

import pytest
import torch

from ovr_megatron.checkpoint.manifest import CheckpointError, check, read_manifest, write_manifest


@pytest.fixture
def checkpoint(tmp_path):
    return make(tmp_path / "step_3", 3)


def make(directory, step):
    (directory / "policy").mkdir(parents=True)
    (directory / "policy" / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    (directory / "policy" / "config.json").write_text("{}")
    (directory / "optimizer").mkdir()
    (directory / "optimizer" / "empty").touch()
    write_manifest(directory, step, extra={"cursor": [1, {"é": 0.1}]})
    return directory


def test_the_file_is_as_documented(checkpoint):
    raw = json.loads((checkpoint / "manifest.json").read_text())
    assert list(raw) == ["format", "step", "files", "versions", "extra"]
    assert (raw["format"], raw["step"], raw["extra"]) == (1, 3, {"cursor": [1, {"é": 0.1}]})
    assert raw["versions"]["torch"] == torch.__version__
    assert sorted(raw["files"]) == ["optimizer/empty", "policy/config.json", "policy/model.safetensors"]
    for name, record in raw["files"].items():
        content = (checkpoint / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_read_gives_what_was_written(checkpoint):
    (checkpoint / "manifest.json").unlink()
    written = write_manifest(checkpoint, 7, extra={"a": 1})
    assert (written.step, written.extra) == (7, {"a": 1})
    assert read_manifest(checkpoint) == check(checkpoint) == written
    assert not list(checkpoint.glob("*.partial"))


def test_written_again_it_does_not_list_itself(checkpoint):
    assert write_manifest(checkpoint, 3) == write_manifest(checkpoint, 3)
    check(checkpoint)


def test_missing_file(checkpoint):
    (checkpoint / "policy" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"policy/config\.json is missing"):
        check(checkpoint)


def test_cut_off_file_is_seen_without_digests(checkpoint):
    path = checkpoint / "policy" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has 1279999 bytes instead of 1280000"):
        check(checkpoint, digests=False)


def test_changed_file_is_seen_by_its_digest(checkpoint):
    path = checkpoint / "policy" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[777] ^= 1
    path.write_bytes(content)
    check(checkpoint, digests=False)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed"):
        check(checkpoint)


def test_a_part_is_checked_alone(checkpoint):
    (checkpoint / "optimizer" / "empty").unlink()
    check(checkpoint, under="policy")
    with pytest.raises(CheckpointError, match="optimizer/empty is missing"):
        check(checkpoint, under="optimizer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "format is None"),
        ('{"format": 2}', "format is 2, this version reads 1; it is of a newer version"),
        ('{"format": 1, "step": 1}', "field is missing or wrong.*'files'"),
        ('{"format": 1, "step": 1, "files": {"a": {"bytes": 1}}, "versions": {}, "extra": {}}', "'sha256'"),
        (
            '{"format": 1, "step": 1, "files": {"../a": {"bytes": 1, "sha256": ""}}, "versions": {}, "extra": {}}',
            "outside the checkpoint",
        ),
    ],
)
def test_bad_manifest(checkpoint, text, message):
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"manifest\.json.*{message}"):
        check(checkpoint)


@pytest.mark.parametrize("name", ["manifest.json", "policy/config.json"])
def test_what_cannot_be_read_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    (checkpoint / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"{name} (cannot be read|is missing)"):
        check(checkpoint)

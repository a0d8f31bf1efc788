"""Speech to text with Whisper, through the attention caches of your choice."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from slimjax.audio import read_sound
from slimjax.material import files_of, fitted
from slimjax.material.speech import planned_layers
from slimjax.models.convert import check_plan
from slimjax.models.load import LoadedWhisper, load_whisper
from slimjax.models.opened import open_model
from slimjax.models.whisper_caches import WhisperLayers
from slimjax.models.whisper_convert import convert_whisper
from slimjax.scheme import Scheme, parse_scheme, parse_schemes
from slimjax.solve.planfile import load_plan
from slimjax.transcribe import Transcript, prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, AUDIO and the choice of caches."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=Path,
        help="directory of a Whisper model: CTranslate2, Hugging Face, or OUT of slimjax convert",
    )
    parser.add_argument("audio", metavar="AUDIO", type=Path, nargs="+", help="wav files, of any rate")
    parser.add_argument(
        "--cache",
        metavar="SCHEME|PLAN.json",
        help="of cross- and self-attention: one scheme (kv:bf16, k:int16+16, x:bf16), two (e:bf16,k:int16+16: "
        "cross, then self), or a plan; default: the plan of a converted model, else kv:bf16",
    )
    parser.add_argument(
        "--calibrate",
        metavar="AUDIO",
        type=Path,
        nargs="+",
        default=[],
        help="speech from which k:...+R schemes learn their maps; without it the weights alone tell",
    )
    parser.add_argument(
        "--language", default="en", help="of the speech, for multilingual models; default %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of text")


def run(options: argparse.Namespace) -> int:
    """Transcribe every file; raises what ``slimjax.cli.main`` reports."""
    choice = None if options.cache is None else cache_choice(options.cache)
    # Every file is read before the model is: a mistake in the last one should not cost the others' work.
    sounds = {path: read_sound(path) for path in options.audio}
    if options.calibrate:
        files_of(list(map(str, options.calibrate)), ".wav")
    loaded = load_whisper(options.model)
    transcriber = prepare(loaded, layers_for(loaded, choice, options.calibrate), language=options.language)
    results = []
    for path in options.audio:
        transcript = transcriber(sounds[path])
        results.append(as_json(path, transcript))
        if not options.json:
            print(as_text(path, transcript), flush=True)
    if options.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    return 0


def cache_choice(text: str) -> tuple[Scheme, Scheme] | Path:
    """``--cache``: the schemes of cross- and self-attention, or the path of a plan.

    Raises ValueError for what is neither.
    """
    if text.endswith(".json"):
        if not Path(text).is_file():
            raise FileNotFoundError(f"--cache {text}: no such plan")
        return Path(text)
    schemes = parse_schemes(text)
    cross, own = schemes[0], schemes[-1]
    if len(schemes) > 2:
        raise ValueError(
            f"--cache {text!r} has {len(schemes)} schemes: give one, or two (cross, then self-attention)"
        )
    if len(schemes) == 1 and cross.basis in ("e", "h"):
        raise ValueError(
            f"--cache {text!r} serves cross-attention alone: name the self-attention's too, "
            f"for example {text},k:int16+16"
        )
    return cross, own


def layers_for(
    loaded: LoadedWhisper, choice: tuple[Scheme, Scheme] | Path | None, calibration: Sequence[Path]
) -> WhisperLayers:
    """The model's layers converted as chosen.

    Raises ValueError where a plan is for another model, or calibration is asked for beside a plan.
    """
    if calibration and not isinstance(choice, tuple):
        raise ValueError("--calibrate learns the maps of schemes: name them with --cache; a plan has its own")
    if isinstance(choice, tuple) and not calibration:
        return convert_whisper(loaded.model, *choice)[0]
    opened = open_model(loaded.directory)
    if isinstance(choice, tuple):
        cross, own = choice
        schemes = {place.name: own if place.spec.causal else cross for place in opened.places}
        return planned_layers(loaded, schemes, fitted(opened, schemes, list(map(str, calibration))))
    plan = opened.plan if choice is None else load_plan(choice)
    if plan is None:
        ordinary = parse_scheme("kv:bf16")
        return convert_whisper(loaded.model, ordinary, ordinary)[0]
    check_plan(plan, opened)
    return planned_layers(loaded, plan.schemes, plan.solutions)


def as_json(path: Path, transcript: Transcript) -> dict[str, object]:
    """The object that ``--json`` prints for one file; bytes are of one 30 s chunk's caches."""
    return {
        "audio": str(path),
        "text": transcript.text,
        "tokens_per_second": round(transcript.tokens_per_second, 3),
        "cache_bytes": {"self": transcript.self_bytes, "cross": transcript.cross_bytes},
        "seconds": {
            "sound": round(transcript.sound_seconds, 3),
            "encoder": round(transcript.encode_seconds, 4),
            "cross_phase": round(transcript.cross_seconds, 4),
            "decoding": round(transcript.decode_seconds, 4),
        },
    }


def as_text(path: Path, transcript: Transcript) -> str:
    """Two lines for one file."""
    return (
        f"{path}: {transcript.text}\n"
        f"  {transcript.tokens_per_second:.1f} tokens/s; cache bytes: self {transcript.self_bytes:,}, "
        f"cross {transcript.cross_bytes:,}"
    )

"""Sound for Whisper: wav files to samples, any rate to 16 kHz, samples to its log-mel spectrogram.

numpy on the host: 30 s of sound take some ten milliseconds, the encoder behind it far more.
"""

import functools
import math
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Float

RATE = 16_000  # Hz, what Whisper hears
CHUNK_SECONDS = 30
CHUNK = CHUNK_SECONDS * RATE  # samples of one encoder input
FFT, HOP = 400, 160  # samples: windows of 25 ms every 10 ms
_RATES = (1_000, 768_000)  # what a sound file's rate may be, in Hz
_UNKNOWN_LENGTH = 0xFFFFFFFF  # what a recorder writes that cannot go back to the header
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_KINDS = {_PCM: (8, 16, 24, 32), _FLOAT: (32, 64)}


def read_sound(path: str | Path) -> Float[np.ndarray, "samples"]:
    """A wav file as mono samples at 16 kHz, float32, full scale 1.

    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: not a wav file, broken, of a kind that is not read, or empty; the message names it.
    """
    samples, rate = read_wav(path)
    return resample(samples, rate)


def read_wav(path: str | Path) -> tuple[Float[np.ndarray, "samples"], int]:
    """A wav file (PCM of 8, 16, 24 or 32 bits, float of 32 or 64) as mono float32 samples and its rate in Hz.

    Channels are averaged. Raises as ``read_sound`` does.
    """
    data = Path(path).read_bytes()
    try:
        chunks = _chunks(data)
        kind, channels, rate, bits = _format(chunks)
        if "data" not in chunks:
            raise ValueError("it has no data chunk")
        samples = _decode(chunks["data"], kind, bits)
        if len(samples) % channels:
            raise ValueError(f"{len(samples)} samples do not divide among {channels} channels")
        if not len(samples):
            raise ValueError("it holds no sound")
        if not np.isfinite(samples).all():
            raise ValueError("it holds samples that are not finite")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a wav file: {error}") from None
    return samples.reshape(-1, channels).mean(axis=1, dtype=np.float64).astype(np.float32), rate


def _chunks(data: bytes) -> dict[str, bytes]:
    """The RIFF chunks by name, of equal names the first."""
    if not data:
        raise ValueError("the file is empty")
    if len(data) < 12 or data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError("it does not begin with RIFF....WAVE")
    found: dict[str, bytes] = {}
    at = 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        at += 8
        if name == b"data" and size == _UNKNOWN_LENGTH:
            size = len(data) - at
        if at + size > len(data):
            raise ValueError(f"chunk {name!r} at byte {at - 8} is {size} bytes, {len(data) - at} are left")
        found.setdefault(name.decode("latin-1").strip(), data[at : at + size])
        at += size + size % 2  # chunks begin at even bytes
    return found


def _format(chunks: dict[str, bytes]) -> tuple[int, int, int, int]:
    """Kind (PCM or float), channels, rate in Hz, bits per sample."""
    header = chunks.get("fmt", b"")
    if len(header) < 16:
        raise ValueError(f"its fmt chunk has {len(header)} bytes, 16 or more are needed")
    kind, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", header)
    if kind == _EXTENSIBLE and len(header) >= 26:
        (kind,) = struct.unpack_from("<H", header, 24)  # the first field of the sub-format's GUID
    if bits not in _KINDS.get(kind, ()):
        raise ValueError(
            f"format {kind} with {bits} bits is not read; PCM (1) of 8, 16, 24 or 32 bits and float (3) of "
            "32 or 64 are"
        )
    if not channels or block != channels * bits // 8:
        raise ValueError(f"{channels} channels of {bits} bits do not make blocks of {block} bytes")
    if not _RATES[0] <= rate <= _RATES[1]:
        raise ValueError(f"its rate is {rate} Hz, expected {_RATES[0]} to {_RATES[1]}")
    return kind, channels, rate, bits


def _decode(data: bytes, kind: int, bits: int) -> Float[np.ndarray, "samples"]:
    """Samples in [-1, 1) of whatever width; channels interleaved."""
    width = bits // 8
    if len(data) % width:
        raise ValueError(f"{len(data)} bytes of sound are no whole number of {bits}-bit samples")
    if kind == _FLOAT:
        return np.frombuffer(data, f"<f{width}").astype(np.float32)
    if bits == 8:  # the one width without a sign
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    if bits == 24:  # into the upper three bytes of 32
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return (padded.reshape(-1).view("<i4").astype(np.float64) / 2**31).astype(np.float32)
    return (np.frombuffer(data, f"<i{width}").astype(np.float64) / 2 ** (bits - 1)).astype(np.float32)


def resample(
    samples: Float[np.ndarray, "samples"], rate: int, target: int = RATE
) -> Float[np.ndarray, "samples"]:
    """Sound of ``rate`` Hz at ``target`` Hz: polyphase, low-pass below the lower of the two half rates."""
    if rate == target:
        return samples
    from scipy.signal import resample_poly  # half a second of import that most callers do not need

    common = math.gcd(rate, target)
    return resample_poly(samples.astype(np.float64), target // common, rate // common).astype(np.float32)


@functools.cache
def mel_filters(bands: int) -> Float[np.ndarray, "bins bands"]:
    """Triangles on Slaney's mel scale over 0-8 kHz, each of unit area per Hz, for ``FFT`` at ``RATE``.

    The scale is linear below 1 kHz (200/3 Hz a mel) and logarithmic above (27 mel for a factor of 6.4); the
    filters are those of librosa's ``filters.mel``, which Whisper ships.
    """
    knee_hz, hz_per_mel, step = 1000.0, 200.0 / 3, math.log(6.4) / 27
    knee = knee_hz / hz_per_mel
    top = knee + math.log(RATE / 2 / knee_hz) / step
    mels = np.linspace(0.0, top, bands + 2)
    edges = np.where(mels < knee, mels * hz_per_mel, knee_hz * np.exp(step * (np.maximum(mels, knee) - knee)))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    bins = np.arange(FFT // 2 + 1)[:, None] * (RATE / FFT)
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))


def log_mel(
    samples: Float[np.ndarray, "samples"], bands: int = 80, length: int = CHUNK
) -> Float[np.ndarray, "frames bands"]:
    """Whisper's log-mel spectrogram of one chunk, float32 (arXiv 2212.04356, section 2.2).

    Args:
        samples: mono at 16 kHz; cut or padded with silence to ``length`` samples.
        bands: 80, or 128 for large-v3.
        length: of the chunk, a multiple of ``HOP``; real models take 30 s.

    Returns:
        [length / HOP, bands]: log10 of the power in each band, at most 8 below the loudest, scaled to
        about [-1, 1].
    """
    if length % HOP or length < FFT:
        raise ValueError(f"{length=}: expected a multiple of {HOP} of at least {FFT} samples")
    chunk = np.zeros(length, np.float64)
    cut = samples[:length]
    chunk[: len(cut)] = cut
    padded = np.pad(chunk, FFT // 2, mode="reflect")
    # One window is centred on every HOP-th sample; the one at the very end is not used.
    windows = np.lib.stride_tricks.sliding_window_view(padded, FFT)[::HOP][: length // HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT) / FFT)
    power = np.abs(np.fft.rfft(windows * hann, axis=1)) ** 2
    logs = np.log10(np.maximum(power @ mel_filters(bands), 1e-10))
    return ((np.maximum(logs, logs.max() - 8.0) + 4.0) / 4.0).astype(np.float32)


def chunks(samples: Float[np.ndarray, "samples"], length: int = CHUNK) -> list[Float[np.ndarray, "samples"]]:
    """A recording in pieces of at most ``length`` samples, 30 s."""
    return [samples[at : at + length] for at in range(0, len(samples), length)]

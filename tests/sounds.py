"""Tones, and wav files of them, written by the standard library."""

import wave

import numpy as np


def tone(frequency, rate, seconds=0.25, channels=1):
    wave_ = 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)
    return np.repeat(wave_[:, None], channels, axis=1)


def write_pcm(path, samples, rate=16_000, bits=16):
    whole = np.round(samples * 2 ** (bits - 1)).astype(np.int64)
    if bits == 8:
        data = (whole + 128).astype(np.uint8).tobytes()
    else:
        data = b"".join(int(x).to_bytes(bits // 8, "little", signed=True) for x in whole.reshape(-1))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(bits // 8)
        file.setframerate(rate)
        file.writeframes(data)

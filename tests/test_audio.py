"""Wav files of every kind and every way of being broken; resampling; properties of the spectrogram."""

import math
import struct

import numpy as np
import pytest
from sounds import tone, write_pcm

from slimjax import audio


def riff(data, *, kind=1, channels=1, rate=16_000, bits=16, block=None, size=None, before=b"", extra=b""):
    block = channels * bits // 8 if block is None else block
    header = struct.pack("<HHIIHH", kind, channels, rate, rate * block, block, bits) + extra
    body = before + b"fmt " + struct.pack("<I", len(header)) + header
    body += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
@pytest.mark.parametrize("channels", [1, 2])
def test_pcm_of_every_width(tmp_path, bits, channels):
    samples = tone(440, 8_000, channels=channels)
    write_pcm(tmp_path / "a.wav", samples, 8_000, bits)
    read, rate = audio.read_wav(tmp_path / "a.wav")
    assert rate == 8_000
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, samples[:, 0], rtol=0, atol=max(0.51 / 2 ** (bits - 1), 1e-7))


@pytest.mark.parametrize("bits", [32, 64])
def test_floats_and_the_extensible_header(tmp_path, bits):
    samples = tone(440, 16_000)[:, 0].astype(f"<f{bits // 8}")
    guid = struct.pack("<HHI", 22, bits, 0) + struct.pack("<H", 3) + bytes(14)
    (tmp_path / "plain.wav").write_bytes(riff(samples.tobytes(), kind=3, bits=bits))
    (tmp_path / "new.wav").write_bytes(riff(samples.tobytes(), kind=0xFFFE, bits=bits, extra=guid))
    for name in ("plain.wav", "new.wav"):
        np.testing.assert_allclose(audio.read_wav(tmp_path / name)[0], samples, rtol=0, atol=1e-7)


def test_channels_are_averaged_and_other_chunks_skipped(tmp_path):
    data = np.array([[100, 300], [-200, 0]], "<i2").tobytes()
    odd = b"LIST" + struct.pack("<I", 3) + b"abc\0"
    (tmp_path / "a.wav").write_bytes(riff(data, channels=2, before=odd))
    np.testing.assert_allclose(audio.read_wav(tmp_path / "a.wav")[0], np.array([200, -100]) / 2**15)


def test_a_recorder_that_could_not_write_the_length(tmp_path):
    (tmp_path / "a.wav").write_bytes(riff(b"\1\0\2\0", size=0xFFFFFFFF))
    np.testing.assert_allclose(audio.read_wav(tmp_path / "a.wav")[0], np.array([1, 2]) / 2**15)


BROKEN = {
    "empty": (b"", "the file is empty"),
    "text": (b"this is no sound at all", "does not begin with RIFF"),
    "no data": (riff(b"\0\0")[:36], "no data chunk"),
    "no format": (b"RIFF\0\0\0\0WAVEdata\2\0\0\0\0\0", "its fmt chunk has 0 bytes"),
    "nothing to hear": (riff(b""), "holds no sound"),
    "half a sample": (riff(b"\0\0\0"), "no whole number of 16-bit samples"),
    "half a frame": (riff(b"\0\0\0\0\0\0", channels=2), "3 samples do not divide among 2 channels"),
    "compressed": (riff(b"\0\0", kind=2, bits=4, block=1), "format 2 with 4 bits is not read"),
    "odd width": (riff(b"\0\0", bits=12, block=1), "format 1 with 12 bits is not read"),
    "no channels": (riff(b"\0\0", channels=0), "0 channels of 16 bits"),
    "no rate": (riff(b"\0\0", rate=0), "its rate is 0 Hz"),
    "a rate to run out of memory with": (riff(b"\0\0", rate=2**31 - 1), "its rate is 2147483647 Hz"),
    "longer than it is": (riff(b"\0\0", size=2**31), "is 2147483648 bytes, 2 are left"),
    "not a number": (riff(struct.pack("<f", math.nan), kind=3, bits=32), "not finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_the_reason(tmp_path, name):
    content, reason = BROKEN[name]
    path = tmp_path / "broken.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.wav cannot be read as a wav file: .*{reason}"):
        audio.read_sound(path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    whole = riff(np.arange(8, dtype="<i2").tobytes())
    for length in range(len(whole)):
        (tmp_path / "cut.wav").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.wav cannot be read"):
            audio.read_wav(tmp_path / "cut.wav")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        audio.read_sound(tmp_path / "absent.wav")


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 44_101])
def test_resampling_keeps_a_tone(rate):
    heard = audio.resample(tone(1_000, rate)[:, 0].astype(np.float32), rate)
    wanted = tone(1_000, audio.RATE)[:, 0]
    assert abs(len(heard) - len(wanted)) <= 1
    inner = slice(200, min(len(heard), len(wanted)) - 200)  # the filter knows nothing past the ends
    np.testing.assert_allclose(heard[inner], wanted[inner], rtol=0, atol=2e-3)


def test_resampling_folds_nothing_back():
    heard = audio.resample(tone(11_000, 44_100)[:, 0].astype(np.float32), 44_100)
    assert np.abs(heard[200:-200]).max() < 2e-3  # 11 kHz would come back as 5 kHz


@pytest.mark.parametrize("bands", [80, 128])
def test_mel_filters_have_unit_area_and_rise_in_frequency(bands):
    filters = audio.mel_filters(bands)
    assert filters.shape == (201, bands)
    assert filters.min() >= 0
    assert np.all(np.diff(np.argmax(filters, axis=0)) >= 0)
    areas = filters.sum(axis=0) * (audio.RATE / audio.FFT)
    np.testing.assert_allclose(
        areas[bands // 2 :], 1.0, atol=0.1
    )  # wide enough for the sum to be an integral


def test_silence_and_loudness():
    silent = audio.log_mel(np.zeros(1_600, np.float32))
    assert silent.shape == (3_000, 80)
    assert silent.dtype == np.float32
    np.testing.assert_allclose(silent, -1.5)  # (log10(1e-10) + 4) / 4
    sound = np.random.default_rng(0).standard_normal(audio.CHUNK).astype(np.float32) * 0.1
    once, twice = audio.log_mel(sound), audio.log_mel(2 * sound)
    np.testing.assert_allclose(twice - once, math.log10(4) / 4, atol=1e-5)
    assert np.ptp(audio.log_mel(sound[:8_000])) <= 2.0 + 1e-6  # the range of 8 powers of ten, over 4


def test_a_tone_is_loudest_in_its_band():
    for frequency in (300.0, 1_200.0, 5_000.0):
        frame = audio.log_mel(tone(frequency, audio.RATE, 1.0)[:, 0].astype(np.float32))[50]
        filters = audio.mel_filters(80)[round(frequency / 40)]
        assert filters[np.argmax(frame)] > 0  # one of the bands that the tone's bin is in


def test_chunks_are_padded_and_cut():
    sound = np.random.default_rng(0).standard_normal(5_000).astype(np.float32)
    padded = np.concatenate([sound, np.zeros(3_000, np.float32)])
    np.testing.assert_array_equal(audio.log_mel(sound, length=8_000), audio.log_mel(padded, length=8_000))
    np.testing.assert_array_equal(
        audio.log_mel(sound, length=3_200), audio.log_mel(sound[:3_200], length=3_200)
    )
    assert [len(piece) for piece in audio.chunks(sound, 2_000)] == [2_000, 2_000, 1_000]
    with pytest.raises(ValueError, match="multiple of 160"):
        audio.log_mel(sound, length=1_000)

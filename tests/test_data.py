"""Text to tokens: batches are pure, the split is by file and stable, wrong paths say so."""

import numpy as np
import pytest

from slimjax.config import DataConfig
from slimjax.data import Corpus, load_corpus


def numbers(size):
    """A corpus whose tokens say where they stand."""
    return Corpus(train=np.arange(size, dtype=np.int32), held_out=np.arange(size, dtype=np.int32), vocab=size)


@pytest.fixture
def folder(tmp_path):
    """60 files, each of one byte value of its own."""
    for index in range(60):
        path = tmp_path / f"part{index % 3}" / f"{index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([100 + index]) * 50)
    return tmp_path


def test_a_batch_is_a_pure_function_of_seed_and_step():
    corpus = numbers(10_000)
    first = corpus.batch(3, 7, 5, 16)
    corpus.batch(3, 8, 5, 16)
    np.testing.assert_array_equal(first, corpus.batch(3, 7, 5, 16))
    assert first.dtype == np.int32
    assert first.shape == (5, 17)
    for other in (corpus.batch(3, 8, 5, 16), corpus.batch(4, 7, 5, 16)):
        assert not np.array_equal(first, other)


def test_windows_are_consecutive_and_reach_both_ends():
    corpus = numbers(20)
    batch = corpus.batch(0, 0, 400, 16)
    assert (np.diff(batch, axis=1) == 1).all()
    assert set(batch[:, 0]) == {0, 1, 2, 3}  # every start that leaves room for 17 tokens, no other


def test_held_out_windows_score_no_token_twice():
    windows = numbers(1000).held_out_windows(9, 100)
    assert windows.shape == (9, 101)
    targets = windows[:, 1:].ravel()
    assert len(set(targets)) == len(targets)
    assert windows[-1, 0] == 8 * (100 + 99 // 8)
    with pytest.raises(ValueError, match=r"held-out text of 1000 tokens has no 10 windows of 100"):
        numbers(1000).held_out_windows(10, 100)


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match=r"training text of 16 tokens has no window of 17"):
        numbers(16).batch(0, 0, 1, 16)


def test_the_split_is_by_file_and_complete(folder):
    corpus = load_corpus(DataConfig(path=str(folder), held_out_percent=25.0))
    train, held_out = set(corpus.train), set(corpus.held_out)
    assert not train & held_out
    assert train | held_out == set(range(100, 160))
    assert 5 <= len(held_out) <= 25
    assert len(corpus.train) + len(corpus.held_out) == 60 * 50
    assert corpus.vocab == 256


def test_the_split_depends_on_relative_names_alone(folder, tmp_path_factory):
    before = set(load_corpus(DataConfig(path=str(folder), held_out_percent=25.0)).held_out)
    (folder / "another.txt").write_bytes(b"\x01" * 9)
    after = set(load_corpus(DataConfig(path=str(folder), held_out_percent=25.0)).held_out)
    assert after - {1} == before
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    folder.rename(elsewhere)
    for path in (elsewhere, elsewhere / "**" / "*.txt"):
        assert set(load_corpus(DataConfig(path=str(path), held_out_percent=25.0)).held_out) == after


def test_the_split_of_today_is_the_split_of_tomorrow(folder):
    held_out = set(load_corpus(DataConfig(path=str(folder), held_out_percent=5.0)).held_out)
    assert {int(value) - 100 for value in held_out} == {16, 25, 26, 41, 45, 47, 51}


def test_some_file_is_held_out_and_some_is_not(tmp_path):
    (tmp_path / "a").write_bytes(b"a" * 10)
    (tmp_path / "b").write_bytes(b"b" * 10)
    for percent in (0.01, 50.0):
        corpus = load_corpus(DataConfig(path=str(tmp_path), held_out_percent=percent))
        assert {len(corpus.train), len(corpus.held_out)} == {10}


def test_one_file_is_split_near_its_end(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(100)))
    corpus = load_corpus(DataConfig(path=str(path), held_out_percent=10.0))
    np.testing.assert_array_equal(corpus.train, np.arange(90))
    np.testing.assert_array_equal(corpus.held_out, np.arange(90, 100))


def test_a_glob_takes_what_it_matches(folder):
    corpus = load_corpus(DataConfig(path=str(folder / "part1" / "*.txt")))
    assert {int(t) for t in (*corpus.train, *corpus.held_out)} == {100 + i for i in range(60) if i % 3 == 1}


@pytest.mark.parametrize("name", ["absent", "absent/*.py", "empty"])
def test_a_path_without_files_is_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"{name.replace('*', '.')}.*expected a file, a folder"):
        load_corpus(DataConfig(path=str(tmp_path / name)))


def test_empty_files_are_named(tmp_path):
    (tmp_path / "nothing.txt").touch()
    with pytest.raises(ValueError, match="files are all empty"):
        load_corpus(DataConfig(path=str(tmp_path)))


def test_the_default_is_the_standard_library_without_its_tests():
    corpus = load_corpus()
    text = corpus.train.tobytes() + corpus.held_out.tobytes()
    assert len(text) > 5_000_000
    assert b"class OrderedDict" in text
    assert b"class TestOrderedDict" not in text
    assert 0.01 < len(corpus.held_out) / len(text) < 0.15


def test_a_tokenizer_counts_tokens_and_bytes(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"left": 0, "right": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = tmp_path / "walk.txt"
    text.write_text("left right right left " * 10)
    config = DataConfig(path=str(text), tokenizer=str(tmp_path / "tokenizer.json"), held_out_percent=50.0)
    corpus = load_corpus(config)
    np.testing.assert_array_equal(corpus.train, [0, 1, 1, 0] * 5)
    assert corpus.vocab == 3
    assert corpus.bytes_per_token == pytest.approx(220 / 2 / len(corpus.held_out))
    text.with_name("broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken.json.*not a readable tokenizer.json"):
        load_corpus(DataConfig(path=str(text), tokenizer=str(tmp_path / "broken.json")))


def test_too_little_text_is_named(tmp_path):
    (tmp_path / "one").write_bytes(b"x")
    with pytest.raises(ValueError, match="one: one byte cannot be split"):
        load_corpus(DataConfig(path=str(tmp_path / "one")))
    with pytest.raises(ValueError, match="count=0 windows"):
        Corpus(train=np.zeros(9, np.uint8), held_out=np.zeros(9, np.uint8), vocab=256).held_out_windows(0, 3)

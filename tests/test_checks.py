"""What a run will read is looked at before its first cell: one line, at the binding that is at fault."""

import json

import pytest
import small_runs

from experiments import checks, run
from experiments.directory import Refused, RunDirectory
from slimjax.config import DataConfig
from slimjax.data import load_corpus

TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {f"word{n}": n for n in range(300)} | {"?": 300},
        "unk_token": "?",
    },
}


@pytest.fixture
def message(tmp_path, capsys):
    """The one line that a config and its overrides end with, dry or not, nothing written."""

    def refused(experiment, *overrides, parts=(small_runs.MODEL, small_runs.HEADS, small_runs.MEASURED)):
        config = small_runs.write(tmp_path, experiment, *parts)
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "empty" / "a.txt").write_text("")
        (tmp_path / "words.json").write_text(json.dumps(TOKENIZER))
        said = set()
        for dry in (["--dry-run"], []):
            sets = [part for text in overrides for part in ("--set", text.replace("TMP", str(tmp_path)))]
            assert run.main([str(config), "--out", str(tmp_path / "out"), *sets, *dry]) == 2
            out, err = capsys.readouterr()
            assert (out, err.count("\n")) == ("", 1)
            said.add(err)
        assert not (tmp_path / "out").exists()
        return said.pop()

    return refused


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("Data.path = 'TMP/nowhere'", "Data: path = '{tmp}/nowhere': expected a file, a folder"),
        ("Data.path = 'TMP/empty'", "Data: path = '{tmp}/empty': its 1 files are all empty"),
        ("Data.tokenizer = 'TMP/nowhere.json'", "Data: tokenizer = '{tmp}/nowhere.json': not a readable"),
        ("Data.tokenizer = 'TMP/quickstart.gin'", "not a readable tokenizer.json"),
        ("Data.tokenizer = 'TMP/words.json'", "default/Model: vocab = 256: the text has 301 tokens"),
        ("Model.vocab = 255", "default/Model: vocab = 255: the text has 256 tokens"),
        ("default/Model.vocab = 255", "default/Model: vocab = 255: the text has 256 tokens"),
        ("Train.length = 9999", "default/Train: length = 9999: training text of "),
        ("Equivalence.tokens = 16000", "Equivalence: tokens = 16000: held-out text of "),
        ("Equivalence.prompts = 3000", "Equivalence: prompts = 3000: held-out text of "),
    ],
)
def test_a_text_that_will_not_do_is_found_before_the_first_cell(message, tmp_path, override, problem):
    found = message("quickstart", override)
    place = override.replace("TMP", str(tmp_path))
    assert found.startswith(f"error: --set {place!r}: {problem.format(tmp=tmp_path)}".split("not a")[0])
    assert problem.format(tmp=tmp_path) in found


def test_the_line_of_a_config_is_named(message, tmp_path):
    found = message("quickstart", parts=(small_runs.MODEL, small_runs.MEASURED.replace("64", "16000")))
    lines = (tmp_path / "quickstart.gin").read_text().splitlines()
    number = lines.index("Equivalence.length = 16") + 1  # the last of those that clash
    assert found.startswith(
        f"error: {tmp_path / 'quickstart.gin'}:{number}: Equivalence: tokens = 16000: held-"
    )


def test_training_asks_for_its_held_out_tokens(message):
    parts = (small_runs.MODEL, small_runs.HEADS, "Training.held_out_tokens = 64\n")
    found = message("train", "Training.held_out_tokens = 50000", parts=parts)
    assert "default/Training: held_out_tokens = 50000: held-out text of" in found


def test_an_axis_is_at_fault_where_it_is_one(message):
    axes = "Ablate.axes = (('Model.vocab', (256, 200)),)"
    assert f"--set {axes!r}: Ablate: axes: with vocab=200: vocab = 200: the text has 256" in message(
        "ablate", axes
    )


def test_a_text_that_changes_while_a_run_is_at_work_ends_it(tmp_path):
    (tmp_path / "a.txt").write_text("some words of a text")
    data = DataConfig(path=str(tmp_path / "a.txt"))
    place = RunDirectory(tmp_path, "run", inputs=checks.named(data, load_corpus(data)))
    assert len(checks.loaded(data, place).train) == 19
    (tmp_path / "a.txt").write_text("some words of a tale")
    with pytest.raises(Refused, match=r"text .*a.txt: changed since the run began"):
        checks.loaded(data, place)


def test_the_digest_is_of_names_contents_split_and_tokenizer(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").write_text("some words of a text")
    (tmp_path / "words.json").write_text(json.dumps(TOKENIZER))

    def digest(**changes):
        return load_corpus(DataConfig(path=str(tmp_path / "text"), **changes)).digest

    words = str(tmp_path / "words.json")
    found = [digest(), digest(held_out_percent=9.0), digest(tokenizer=words)]
    assert digest() == found[0]
    (tmp_path / "words.json").write_text(json.dumps(TOKENIZER) + "\n")
    found.append(digest(tokenizer=words))
    (tmp_path / "text" / "a").rename(tmp_path / "text" / "b")
    found.append(digest())
    (tmp_path / "text" / "b").write_text("some words of a tale")
    found.append(digest())
    assert len(set(found)) == len(found)

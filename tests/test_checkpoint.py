"""Checkpoints: complete or absent, and refused when they are not what is expected or not what was saved."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimjax import checkpoint


def tree(scale=1.0):
    return {
        "kernel": scale * jnp.arange(6, dtype=jnp.float32).reshape(2, 3),
        "half": [jnp.asarray([1.5, 2.5], jnp.bfloat16)],
        "step": jnp.asarray(7, jnp.int32),
    }


def zeros():
    return jax.tree.map(jnp.zeros_like, tree())


def test_round_trip_of_the_newest_and_of_a_named_step(tmp_path):
    for step in (1, 12, 3):
        checkpoint.save(tmp_path, step, tree(step))
    assert checkpoint.latest_step(tmp_path) == 12
    for step, found in (
        (12, checkpoint.restore(tmp_path, zeros())),
        (3, checkpoint.restore(tmp_path, zeros(), 3)),
    ):
        for saved, read in zip(jax.tree.leaves(tree(step)), jax.tree.leaves(found), strict=True):
            assert saved.dtype == read.dtype
            np.testing.assert_array_equal(np.asarray(saved), np.asarray(read))
        assert jax.tree.structure(found) == jax.tree.structure(tree())


def test_a_step_is_replaced(tmp_path):
    checkpoint.save(tmp_path, 1, tree(1.0))
    checkpoint.save(tmp_path, 1, tree(2.0))
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, zeros())["kernel"], tree(2.0)["kernel"])
    assert len(list(tmp_path.iterdir())) == 1
    checkpoint.save(tmp_path, 1, tree(3.0))
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, zeros(), 1)["kernel"], tree(3.0)["kernel"])
    assert len(list(tmp_path.iterdir())) == 1


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, step, tree(step), keep=2)
    assert list(checkpoint.steps(tmp_path)) == [3, 10]
    checkpoint.save(tmp_path, 10, tree(), keep=1)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("step", [1, 2])
def test_there_is_a_good_one_at_every_moment(tmp_path, monkeypatch, step):
    """Saving anew (step 1) or further (step 2) dies before each of its acts on the disk in turn."""

    class Killed(BaseException):
        pass

    def dying(name, owner, left):
        act = getattr(owner, name)

        def instead(*arguments, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return act(*arguments, **options)

        monkeypatch.setattr(owner, name, instead)

    checkpoint.save(tmp_path, 1, tree(1.0), keep=1)
    found = []
    for survived in range(100):
        left = [survived]
        for name, owner in (
            ("rename", Path),
            ("mkdir", Path),
            ("write_text", Path),
            ("rmtree", shutil),
            ("_flush", checkpoint),
        ):
            dying(name, owner, left)
        try:
            checkpoint.save(tmp_path, step, tree(2.0), keep=1)
        except Killed:
            monkeypatch.undo()
            found.append(float(checkpoint.restore(tmp_path, zeros())["kernel"][0, 1]))
            continue
        break
    monkeypatch.undo()
    assert set(found) == {1.0, 2.0}  # before and after it counted
    assert len(found) > 10
    assert float(checkpoint.restore(tmp_path, zeros())["kernel"][0, 1]) == 2.0


def test_shapes_are_enough_to_read_one(tmp_path):
    checkpoint.save(tmp_path, 1, tree())
    found = checkpoint.restore(tmp_path, jax.eval_shape(tree))
    np.testing.assert_array_equal(found["kernel"], tree()["kernel"])


def test_an_interrupted_save_is_no_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, tree())
    monkeypatch.setattr(checkpoint, "_describe", lambda leaf: 1 / 0)  # after the arrays, before the manifest
    with pytest.raises(ZeroDivisionError):
        checkpoint.save(tmp_path, 2, tree())
    monkeypatch.undo()
    assert checkpoint.latest_step(tmp_path) == 1
    checkpoint.restore(tmp_path, zeros())
    checkpoint.save(tmp_path, 2, tree())  # what the first attempt left does not stand in the way
    assert checkpoint.latest_step(tmp_path) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": jnp.zeros((3, 2))}, "kernel.*expected"),
        ({"kernel": jnp.zeros((2, 3), jnp.float16)}, "kernel.*float32.*expected.*float16"),
        ({"other": jnp.zeros(1)}, "other leaves than expected.*other"),
    ],
)
def test_another_tree_is_refused(tmp_path, change, message):
    checkpoint.save(tmp_path, 1, tree())
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(tmp_path, {**zeros(), **change})


def test_no_checkpoint_is_said(tmp_path):
    assert checkpoint.latest_step(tmp_path / "absent") is None
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoint.restore(tmp_path, zeros())
    checkpoint.save(tmp_path, 1, tree())
    with pytest.raises(ValueError, match="no checkpoint of step 4"):
        checkpoint.restore(tmp_path, zeros(), 4)


def test_what_is_not_finite_is_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match=r"kernel.*not finite"):
        checkpoint.save(tmp_path, 1, tree(float("inf")))
    assert checkpoint.latest_step(tmp_path) is None


def flipped(path, bit):
    """A bit of a file, counted from its start, is the other."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_refused(tmp_path):
    """First, last and random bits of every file: the message has the file, and of arrays the leaf."""
    random = np.random.default_rng(0)
    large = {"kernel": random.normal(size=500).astype(np.float32), "bias": random.normal(size=700)}
    path = checkpoint.save(tmp_path, 1, large)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    kinds = {file.name for file in files}
    assert {"manifest.json", "manifest.sha256", "_METADATA", "manifest.ocdbt"} <= kinds
    named = set()
    for file in files:
        whole = file.read_bytes()
        # Spread over the file as well, so that some lie in either array, wherever the store puts them.
        spread = np.linspace(0, 8 * len(whole) - 1, 10).astype(int)
        for bit in {*spread, *random.integers(0, 8 * len(whole), 2)}:
            flipped(file, bit)
            with pytest.raises(ValueError, match=f"damaged.*{file.name}") as error:
                checkpoint.restore(tmp_path, large)
            named |= {leaf for leaf in large if f"(leaf ['{leaf}'])" in str(error.value)}
            file.write_bytes(whole)
    assert named == set(large)
    checkpoint.restore(tmp_path, large)


def test_a_missing_file_is_named(tmp_path):
    path = checkpoint.save(tmp_path, 1, tree())
    for name in ("arrays/_METADATA", "manifest.json"):
        (path / name).rename(path / "aside")
        with pytest.raises(ValueError, match=f"damaged.*{name}"):
            checkpoint.restore(tmp_path, zeros())
        (path / "aside").rename(path / name)


def test_a_checkpoint_of_the_right_files_with_another_leaf_is_refused(tmp_path, monkeypatch):
    """What orbax returns is held against the manifest as well."""
    path = checkpoint.save(tmp_path, 1, tree())
    read = checkpoint._read
    monkeypatch.setattr(checkpoint, "_read", lambda *given: {**read(*given), "['step']": np.int32(8)})
    with pytest.raises(ValueError, match=rf"{path} is damaged: \['step'\]"):
        checkpoint.restore(tmp_path, zeros())


def test_the_manifest_is_one_that_sha256sum_reads(tmp_path):
    path = checkpoint.save(tmp_path, 1, tree())
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum")
    subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=path, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError("UNAVAILABLE: " + "x" * 500 + "\nNo space left on device [OS error 28]"),
            "No space left on device",
        ),
        (RuntimeError("Event loop is closed"), r"Event loop is closed \(\d+ MiB are free there\)"),
        (OSError(28, "No space left on device", "x" * 300), "No space left on device"),
        (ValueError("pages\n" * 200), r"(pages )+[pages]*\.\.\. \(\d+ MiB are free there\)"),
    ],
)
def test_a_save_that_failed_says_so_in_a_few_words(tmp_path, monkeypatch, error, said):
    def full(*_):
        raise error

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match=f"could not be written: {said}$") as caught:
        checkpoint.save(tmp_path, 1, tree())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_threads_that_come_too_late_are_passed_over_and_other_errors_are_not(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)

    class Unraisable:
        exc_value = RuntimeError("Event loop is closed")

    with pytest.raises(OSError, match="full"), checkpoint._orbax():
        raise OSError("full")
    sys.unraisablehook(Unraisable)
    assert seen == []
    Unraisable.exc_value = RuntimeError("another")
    sys.unraisablehook(Unraisable)
    assert seen == [Unraisable]
    with checkpoint._orbax():
        pass
    sys.unraisablehook(Unraisable)
    assert seen == [Unraisable] * 2


# tensorstore's threads may end after orbax has given up
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_costs_the_new_one_alone(tmp_path):
    """Files may grow to 20 kB: the disk of a test that may not mount one."""
    checkpoint.save(tmp_path, 1, tree())
    large = {"kernel": np.random.default_rng(0).normal(size=100_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step_00000002 could not be written.*too large"):
            checkpoint.save(tmp_path, 2, large, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    checkpoint.restore(tmp_path, zeros())
    checkpoint.save(tmp_path, 2, large, keep=1)
    assert checkpoint.latest_step(tmp_path) == 2

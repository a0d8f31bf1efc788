"""Checkpoints: complete or absent, and refused when they are not what is expected or not what was saved."""

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
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


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
    with pytest.raises(ValueError, match=r"kernel.*not finite"):
        checkpoint.save(tmp_path, 1, tree(float("inf")))
    assert checkpoint.latest_step(tmp_path) is None


def test_damage_is_noticed(tmp_path):
    """Other values of the right shape, as a flipped bit leaves them: orbax would return them."""
    path = checkpoint.save(tmp_path, 1, tree())
    other = checkpoint.save(tmp_path, 2, tree(2.0))
    (path / "manifest.json").write_text((other / "manifest.json").read_text())
    with pytest.raises(ValueError, match=r"kernel.*is damaged"):
        checkpoint.restore(tmp_path, zeros(), 1)

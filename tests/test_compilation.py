"""The folder of compiled programs: an entry that a killed process left unfinished goes, all others stay."""

import os
import zlib

import jax
import jax.numpy as jnp

from experiments import compilation


def test_a_torn_entry_is_deleted_and_the_others_are_not(tmp_path):
    whole = zlib.compress(b"program" * 1000)
    kept = {"a-cache": whole, "b-cache": b"\x28\xb5\x2f\xfd other compression", "a-atime": whole[:5]}
    torn = {"c-cache": whole[:-3], "d-cache": b"", "e-cache": whole[:5] + b"?" * 40}
    for name, entry in (kept | torn).items():
        (tmp_path / name).write_bytes(entry)
    compilation.drop_torn(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".looked", *kept}
    (tmp_path / "f-cache").write_bytes(whole[:9])
    (tmp_path / "g-cache").write_bytes(whole[:9])
    os.utime(tmp_path / "g-cache", (0, 0))  # before the last look: not read again
    compilation.drop_torn(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".looked", "g-cache", *kept}
    compilation.drop_torn(tmp_path / "new")  # where nothing is yet


def test_seconds_of_compilation_grow_with_a_program_that_is_new_and_with_no_other():
    compilation.compile_seconds()  # from here on
    program = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))
    three, four = jnp.ones((3, 3)), jnp.ones((4, 4))
    seen = [compilation.compile_seconds()]
    for x in (three, three, four):
        program(x).block_until_ready()
        seen.append(compilation.compile_seconds())
    assert seen[0] < seen[1] == seen[2] < seen[3]

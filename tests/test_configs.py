"""Every shipped config: its golden values, its cells in the abstract, every mistake in every binding."""

import dataclasses
import inspect
import os
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import pytest

from experiments import run
from experiments.estimate import estimate
from experiments.launch import checked_units
from experiments.settings import EXPERIMENTS, SECTIONS
from slimjax import checkpoint, pretrained
from slimjax.config import DataConfig, ModelConfig, TrainConfig
from slimjax.train import TrainState, state_shapes

ROOT = Path(__file__).parent.parent / "configs"
GOLDEN = Path(__file__).parent / "golden"
CONFIGS = sorted(ROOT.rglob("*.gin"))
names = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix()[:-4])


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    """What a config asks to be told on the command line, by its experiment: a trained model of ones."""
    folder = tmp_path_factory.mktemp("given") / "default"
    model = ModelConfig(layers=1, width=8, heads=2)
    pretrained.describe(folder, model, DataConfig())
    shapes = state_shapes(model, TrainConfig()).params
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    none = jnp.zeros((), jnp.int32)
    state = TrainState(params=params, opt_state=(), step=none, loss_sum=jnp.zeros(()), loss_count=none)
    checkpoint.save(folder, 10, state)
    return {
        "equivalence": [f"Pretrained.checkpoint = {str(folder)!r}"],
        "slim_error": [f"SlimError.trained = {str(folder)!r}"],
        "compare": [f"Compare.trained = {(str(folder),)!r}"],
    }


def loaded(path, given):
    """The plan of a config, told what it asks for."""
    told = [told for name, told in given.items() if f"Run.experiment = '{name}'" in path.read_text()]
    try:
        return run.load(path, *told)
    except run.Fault as fault:
        if "`make models` fetches" in str(fault):
            pytest.skip(str(fault))
        raise


@names
def test_it_resolves_to_its_golden_values(path, given):
    """After a deliberate change: SLIMJAX_WRITE_GOLDEN=1 writes them anew."""
    text = run.canonical_json(loaded(path, given).resolved)
    golden = (GOLDEN / path.relative_to(ROOT)).with_suffix(".json")
    if os.environ.get("SLIMJAX_WRITE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@names
def test_its_cells_can_be_built(path, given):
    plan = loaded(path, given)
    units = checked_units(plan)
    found = estimate(plan.experiment, units, plan.config)
    assert found.cells == sum(len(unit.cells) for unit in units) > len(found.refused)


def test_every_golden_file_has_its_config():
    stems = {path.relative_to(ROOT).with_suffix("") for path in CONFIGS}
    assert {path.relative_to(GOLDEN).with_suffix("") for path in GOLDEN.rglob("*.json")} == stems


def annotation(section, field):
    """The rule of a field, without its `| None`."""
    hint = typing.get_type_hints(SECTIONS[section], include_extras=True)[field]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def out_of_range(binding):
    """A value of the right type that the field cannot have; None for a field that takes every one of its type."""
    hint = annotation(binding.section, binding.field)
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return type(binding.value)(-(10**12))
    if origin is Literal or (binding.section, binding.field) == ("Run", "experiment"):
        return "nonesuch"
    if origin is tuple:
        return (*binding.value, binding.value[0]) if binding.value else None  # values are distinct everywhere
    assert hint in (str, bool, int, float), hint
    return None


def written(binding, name="", value=None):
    """The binding as a line."""
    return f"{name or binding.name} = {(binding.value if value is None else value)!r}"


def mutations(binding):
    """(kind, line, what the fault says) for every mistake."""
    scope = f"{binding.scope}/" if binding.scope else ""
    yield "name", written(binding, f"{binding.name}x"), "unknown field"
    yield "name", written(binding, f"{scope}{binding.section}x.{binding.field}"), "unknown section"
    yield "type", written(binding, value={"a": 1}), "expected"
    yield "range", written(binding, value=out_of_range(binding)), ""


@names
def test_every_mistake_in_every_binding_is_one_line_at_its_place(path, tmp_path, given):
    whole = loaded(path, given)
    text_root = tmp_path / "configs"
    text_root.mkdir()
    mutant = text_root / "mutant.gin"
    bound = run.bindings(run.gather(path, ROOT.resolve()))
    assert all(binding.field for binding in bound), "a macro: write it into this test"
    right = [written(binding) for binding in bound]
    told = next((told for key, told in given.items() if f"Run.experiment = {key!r}" in right), [])

    def fault(lines):
        mutant.write_text("\n".join(lines) + "\n")
        with pytest.raises(run.Fault) as caught:
            run.load(mutant, told)
        message = str(caught.value)
        assert "\n" not in message
        return message

    mutant.write_text("\n".join(right) + "\n")
    assert run.canonical_json(run.load(mutant, told).resolved) == run.canonical_json(whole.resolved)
    checked = 0
    for number, binding in enumerate(bound):
        for kind, line, problem in mutations(binding):
            if kind == "range" and out_of_range(binding) is None:
                continue
            message = fault([*right[:number], line, *right[number + 1 :]])
            assert message.startswith(f"{mutant}:{number + 1}: "), (kind, message)
            assert problem in message, (kind, message)
            checked += 1
        stray = f"nonesuch/{binding.section}.{binding.field}"
        fault([*right[:number], written(binding, stray), *right[number + 1 :]])  # without it others may clash
        for extra in (stray, binding.field):
            message = fault([*right, written(binding, extra)])
            assert message.startswith(f"{mutant}:{len(right) + 1}: {extra} is bound but never used")
        assert fault([*right, right[number]]).startswith(
            f"{mutant}:{len(right) + 1}: {binding.name} is bound twice"
        )
    assert checked >= 3 * len(bound)


@names
def test_a_section_that_its_experiment_does_not_read_is_refused(path, given, tmp_path):
    plan = loaded(path, given)
    told = given.get(plan.name, [])
    unread = [
        section
        for section in SECTIONS
        if not re.search(rf"^# Parameters for (.*/)?{section}:", plan.operative, re.MULTILINE)
    ]
    assert unread
    for section in unread:
        field = next(iter(inspect.signature(SECTIONS[section]).parameters))
        default = next(f.default for f in dataclasses.fields(SECTIONS[section]) if f.name == field)
        with pytest.raises(run.Fault, match=f"{section}.{field} is bound but never used"):
            run.load(path, [*told, f"{section}.{field} = {default!r}"])


def test_every_experiment_has_a_config():
    found = {name for path in CONFIGS for name in re.findall(r"Run.experiment = '(\w+)'", path.read_text())}
    assert found == set(EXPERIMENTS)

"""Configs check themselves: types, words, ranges, fields that clash; equal configs have equal JSON and hash."""

import dataclasses
import json

import pytest

from slimjax.config import (
    ConfigError,
    DataConfig,
    EquivalenceConfig,
    ModelConfig,
    TrainConfig,
    canonical_json,
    digest,
    resolved,
)


@pytest.mark.parametrize(
    ("section", "field", "value", "problem"),
    [
        (ModelConfig, "layers", "4", "expected int, got str"),
        (ModelConfig, "layers", 4.0, "expected int, got float"),
        (ModelConfig, "layers", True, "expected int, got bool"),
        (ModelConfig, "layers", 0, "expected a finite number >= 1"),
        (ModelConfig, "layers", None, "expected int, got NoneType"),
        (ModelConfig, "bias", 1, "expected bool, got int"),
        (ModelConfig, "mlp", "relu", "expected one of 'swiglu', 'gelu'"),
        (ModelConfig, "position", ["rope"], "expected one of"),
        (ModelConfig, "rope_theta", 0.0, "> 0.0"),
        (ModelConfig, "kv_heads", 3, "not a multiple of kv_heads"),
        (ModelConfig, "heads", 3, "not a multiple of heads"),
        (ModelConfig, "head_dim", 5, "even head size"),
        (TrainConfig, "learning_rate", float("nan"), "expected a finite number"),
        (TrainConfig, "learning_rate", "1e-3", "expected float, got str"),
        (TrainConfig, "final_fraction", 1.5, "<= 1.0"),
        (TrainConfig, "warmup", 10_000, "longer than steps"),
        (TrainConfig, "accumulation", 3, "not a multiple of accumulation"),
        (DataConfig, "held_out_percent", 0.0, "> 0.0"),
        (EquivalenceConfig, "schemes", ["kv:bf16"], "expected a tuple, write"),
        (EquivalenceConfig, "schemes", "kv:bf16", "expected a tuple, write"),
        (EquivalenceConfig, "schemes", ("kv:bf17",), "did you mean 'bf16'"),
        (EquivalenceConfig, "schemes", ("kv:bf16", "kv:bf16"), "expected distinct values"),
        (EquivalenceConfig, "schemes", (), "at least one"),
        (EquivalenceConfig, "dtypes", ("float32", "double"), "expected one of"),
        (EquivalenceConfig, "tokens", 100, "not a multiple of length"),
    ],
)
def test_a_wrong_value_is_refused(section, field, value, problem):
    with pytest.raises(ConfigError, match=problem):
        section(**{field: value})


def test_an_error_knows_its_field():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(learning_rate=-1.0)
    assert caught.value.field == "learning_rate"


def test_configs_are_frozen_and_hashable():
    config = ModelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.layers = 2  # type: ignore[misc]
    assert hash(config) == hash(ModelConfig())
    assert {config: 1}[ModelConfig()] == 1


def test_an_int_for_a_float_is_that_float():
    assert digest(TrainConfig(weight_decay=1)) == digest(TrainConfig(weight_decay=1.0))
    assert type(TrainConfig(weight_decay=1).weight_decay) is float


def test_every_field_reaches_the_digest():
    seen = {digest(TrainConfig())}
    for change in ({"steps": 999}, {"seed": 1}, {"clip": None}, {"dtype": "bfloat16"}, {"beta2": 0.9}):
        seen.add(digest(TrainConfig(**change)))
    assert len(seen) == 6


def test_canonical_json_is_plain_and_sorted():
    text = canonical_json({"b": (1, 2), "a": DataConfig()})
    assert list(json.loads(text)) == ["a", "b"]
    assert json.loads(text)["b"] == [1, 2]
    assert json.loads(canonical_json(ModelConfig())) == resolved(ModelConfig())


def test_derived_sizes():
    config = ModelConfig(width=128, heads=4)
    assert (config.K, config.H, config.F) == (4, 32, 352)
    config = ModelConfig(width=128, heads=4, kv_heads=2, head_dim=16, mlp="gelu")
    assert (config.K, config.H, config.F) == (2, 16, 512)
    assert ModelConfig(mlp_width=64).F == 64


def test_two_spellings_of_one_scheme_are_one_scheme():
    with pytest.raises(ConfigError, match="schemes has k:int8 twice, the second time as 'k2:int8'"):
        EquivalenceConfig(schemes=("k:int8", "k2:int8"))

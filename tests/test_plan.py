"""The planner: budgets are kept, are monotone, and what cannot be served is refused by name."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import test_remedies as remedies
from test_remedies import WIDTH, calibration, weights

from slimjax import DecodeSpec, Position, Projections, convert, parse_scheme
from slimjax.solve.options import Layer, Option, menu
from slimjax.solve.plan import candidates, choose, make_plan, measure, weights_digest
from slimjax.solve.planfile import load_plan, save_plan

NOWHERE = Position()


def layer(name, condition, seed=0, position=NOWHERE, wk=None):
    made, wv = weights(condition, seed)
    arrays = [jnp.asarray(w.reshape(WIDTH, 4, 8), jnp.float32) for w in (made if wk is None else wk, wv)]
    spec = DecodeSpec(
        scheme=parse_scheme("kv:bf16"), heads=4, kv_heads=4, head_dim=8, width=WIDTH, position=position
    )
    projections = Projections(wq=arrays[0], wk=arrays[0], wv=arrays[1], wo=jnp.zeros((4, 8, WIDTH)))
    return Layer(name=name, projections=projections, spec=spec)


LAYERS = [layer(f"layer {n}", 10.0 ** (2 * n), seed=n) for n in range(3)]


@pytest.fixture(scope="module")
def data():
    return [calibration(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def menus(data):
    return measure(LAYERS, data)


@pytest.fixture(scope="module")
def plan(menus):
    return choose(LAYERS, menus, max_error=2e-3, described="made up")


def error_of(plan):
    return max(choice.error for choice in plan.layers)


def test_an_error_budget_is_kept_with_the_fewest_bytes(plan):
    assert error_of(plan) <= 2e-3
    for choice in plan.layers:
        keys = [t for t in choice.tried if t["scheme"].startswith("k:")]
        cheaper = [t for t in keys if t["bytes_per_token"] < choice.bytes_per_token]
        assert all(t["error"] > 2e-3 for t in cheaper)
    ranks = [parse_scheme(choice.scheme).extra for choice in plan.layers]
    assert ranks == sorted(ranks)  # the worse the conditioning, the more coordinates
    assert plan.bytes_per_token < plan.kv_bytes_per_token


def test_the_figures_of_a_plan_are_those_of_the_converted_layer(plan, data):
    """Rebuilt from the plan's own scheme and map through the layer that decoding would use."""
    for each, choice, seen in zip(LAYERS, plan.layers, data, strict=True):
        spec = each.under(parse_scheme(choice.scheme))
        made = convert(each.projections, spec, solution=plan.solutions[choice.name]).layer
        solution = dataclasses.replace(
            plan.solutions[choice.name],
            weight=np.asarray(made.weights.w_kv, np.float64).reshape(-1, WIDTH),
            extra=None if made.weights.extra is None else np.asarray(made.weights.extra, np.float64),
        )
        error = remedies.value_error(seen.held_out, each.keys, each.values, solution, spec)
        assert error == pytest.approx(choice.error, rel=1e-3)


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_tighter_budget_never_errs_more(menus, calibrated):
    if not calibrated:
        menus = measure(LAYERS)
    errors = [error_of(choose(LAYERS, menus, max_error=limit)) for limit in (0.5, 0.05, 5e-3, 2e-3, 1e-4)]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) > 2
    budgets = (108, 192, 200, 220, 260, 400)
    plans = [choose(LAYERS, menus, max_bytes_per_token=most) for most in budgets]
    assert all(plan.bytes_per_token <= most for plan, most in zip(plans, budgets, strict=True))
    errors = [error_of(plan) for plan in plans]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) > 2


@pytest.mark.parametrize("null", [1, 3, 5])
def test_planted_null_directions_are_bought_back_or_refused(data, null):
    left, right = (np.linalg.qr(np.random.default_rng(s).standard_normal((WIDTH, WIDTH)))[0] for s in (1, 2))
    values = np.ones(WIDTH)
    values[-null:] = 0
    planted = layer("planted", 1, wk=(left * values) @ right)
    only_keys = [scheme for scheme in candidates(planted) if scheme.basis == "k"]
    for seen in (data[:1], None):
        plan = make_plan([planted], seen, max_error=2e-3, schemes=only_keys)
        assert parse_scheme(plan.layers[0].scheme).extra >= null
        few = [scheme for scheme in only_keys if scheme.extra < null]
        with pytest.raises(NotImplementedError, match="planted: no scheme"):
            make_plan([planted], seen, max_error=2e-3, schemes=few)


def test_a_budget_that_nothing_meets_names_the_layer_and_the_best(menus):
    with pytest.raises(NotImplementedError, match=r"layer 0: no scheme has .* the best is x:int16 with"):
        choose(LAYERS, menus, max_error=1e-9)
    with pytest.raises(NotImplementedError, match="the smallest takes 108"):
        choose(LAYERS, menus, max_bytes_per_token=10)


def test_the_menu_has_the_cheap_schemes_that_a_layer_can_use():
    def after_keys(each):
        names = [str(scheme) for scheme in candidates(each)]
        keys = [name for name in names if name.startswith("k:")]
        assert names[: len(keys)] == keys
        return names[len(keys) :]

    kv = ["kv:int8", "kv:bf16", "kv:int16"]
    assert after_keys(LAYERS[0]) == ["v:int16", "x:bf16", "x:int16", "x:int8", *kv]
    turned = layer("turned", 10, position=Position(kind="rope"))
    assert after_keys(turned) == ["v1:int16", "x1:bf16", "x1:int16", "x1:int8", *kv]
    narrow = dataclasses.replace(LAYERS[0], spec=dataclasses.replace(LAYERS[0].spec, kv_heads=3, heads=3))
    assert after_keys(narrow) == ["x:bf16", "x:int16", "x:int8", *kv]


def test_a_singular_matrix_of_values_is_a_refusal_not_a_crash(data):
    """An input that no value depends on: elimination meets a zero pivot."""
    one = LAYERS[0]
    lost = one.projections.wv.at[0].set(0)
    singular = dataclasses.replace(one, projections=dataclasses.replace(one.projections, wv=lost))
    for seen in (data[0], None):
        (found,) = menu(singular, [parse_scheme("v:int16")], seen)
        assert "layer 0: W_V is singular" in (found.refused or "")
        (usual,) = menu(one, [parse_scheme("v:int16")], seen)
        assert usual.error < 0.1


def test_keys_are_kept_where_they_fit_unless_keys_with_values_are_smaller():
    def menu_of(*rows):
        return [
            [
                Option(scheme=parse_scheme(text), error=error, bytes_per_token=size)
                for text, error, size in rows
            ]
        ]

    rest = ("x1:int8", 1e-3, 36), ("v1:int16", 1e-3, 68), ("kv:int8", 4e-3, 96)
    kept = choose(LAYERS[:1], menu_of(("k:int16+8", 1e-3, 100), *rest), max_error=2e-3).layers[0]
    assert kept.scheme == "k:int16+8"
    assert "x1:int8 would take 36 bytes but make keys and values anew" in kept.reason
    assert "v1:int16 would take 68 bytes but make keys anew" in kept.reason
    looser = choose(LAYERS[:1], menu_of(("k:int16+8", 1e-3, 100), *rest), max_error=5e-3).layers[0]
    assert looser.scheme == "kv:int8"
    without = choose(LAYERS[:1], menu_of(("k:int16+8", 1e-2, 100), *rest), max_error=5e-3).layers[0]
    assert without.scheme == "x1:int8"


@pytest.mark.parametrize(
    "budget",
    [{}, {"max_error": 1e-3, "max_bytes_per_token": 9}, {"max_error": 0.0}, {"max_bytes_per_token": -1}],
)
def test_budgets_that_are_none(budget):
    with pytest.raises(ValueError, match="budget"):
        choose(LAYERS, (), **budget)


def test_rope_keeps_the_bases_that_it_allows(data):
    turned = layer("turned", 10, position=Position(kind="rope"))
    options = {
        str(o.scheme): o for o in menu(turned, [parse_scheme(s) for s in ("x:bf16", "x1:bf16")], data[0])
    }
    assert "RoPE" in options["x:bf16"].refused
    assert options["x1:bf16"].error < 3e-3


def test_break_even_by_counting(plan):
    """The fewest cached tokens at which weights and cache together read no more than kv:bf16's."""
    extra = 0
    for choice in plan.layers:
        rank = parse_scheme(choice.scheme).extra
        extra += 4 * (WIDTH + rank) * WIDTH + 4 * WIDTH * rank - 2 * WIDTH * WIDTH
    tokens = next(n for n in range(10**6) if extra + n * plan.bytes_per_token <= n * plan.kv_bytes_per_token)
    assert plan.break_even == tokens > 0


def test_a_plan_survives_the_disk(tmp_path, plan):
    path = tmp_path / "plan.json"
    save_plan(path, plan)
    read = load_plan(path, weights_digest(LAYERS))
    assert read.layers == tuple(dataclasses.replace(c, tried=list(c.tried)) for c in plan.layers)
    assert (read.digest, read.budget, read.calibration) == (plan.digest, plan.budget, "made up")
    for name, solution in plan.solutions.items():
        np.testing.assert_allclose(read.solutions[name].weight, solution.weight, rtol=1e-6)
    assert json.loads(path.read_text())["totals"]["break_even_tokens"] == plan.break_even
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]


def test_a_plan_may_be_edited_by_hand(tmp_path, plan):
    path = tmp_path / "plan.json"
    save_plan(path, plan)
    content = json.loads(path.read_text())
    content["layers"][0]["scheme"] = "k:int16+9"
    content["layers"][1]["scheme"] = "kv:bf16"
    path.write_text(json.dumps(content))
    edited = load_plan(path)
    assert [str(scheme) for scheme in edited.schemes.values()][:2] == ["k:int16+9", "kv:bf16"]
    assert set(edited.solutions) == {"layer 2"}  # the others' maps no longer fit


def damage(content, what):
    if what == "format":
        content["format"] = "slimjax plan 0"
    elif what == "scheme":
        content["layers"][0]["scheme"] = "k:int61"
    elif what == "missing":
        del content["layers"][0]["error"]
    elif what == "layers":
        content["layers"] = 3
    return content


@pytest.mark.parametrize("what", ["format", "scheme", "missing", "layers"])
def test_damaged_plans(tmp_path, plan, what):
    path = tmp_path / "plan.json"
    save_plan(path, plan)
    path.write_text(json.dumps(damage(json.loads(path.read_text()), what)))
    with pytest.raises(ValueError, match=r"plan\.json: not a plan"):
        load_plan(path)


def test_stale_plans_and_changed_maps(tmp_path, plan):
    path = tmp_path / "plan.json"
    save_plan(path, plan)
    other = weights_digest([layer("layer 0", 10, seed=9), *LAYERS[1:]])
    with pytest.raises(ValueError, match=r"made for other weights .* plan again"):
        load_plan(path, other)
    maps = path.with_suffix(".safetensors")
    held = bytearray(maps.read_bytes())
    held[-1] ^= 1
    maps.write_bytes(bytes(held))
    with pytest.raises(ValueError, match="not the maps"):
        load_plan(path)

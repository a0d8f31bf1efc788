"""The strict process every test runs in; set before anything imports jax."""

import os

# A device test may name another platform; two workers on two cores must not spawn two threads each.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ["SLIMJAX_TYPECHECK"] = "1"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("MPLBACKEND", "Agg")
# Every run of the tests compiles for itself, and leaves nothing in the user's cache.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import hypothesis
import jax
import pytest

# The same examples on every run: a failure found by CI is a failure anybody can repeat.
hypothesis.settings.register_profile(
    "slimjax",
    derandomize=True,
    deadline=None,
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("slimjax")

assert jax.config.jax_numpy_rank_promotion == "raise", "jax was imported before conftest set its switches"


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        type=int,
        metavar="N",
        help="of a test with many parameters run N cases only, evenly spread",
    )


@pytest.hookimpl(trylast=True)  # of those that -m and -k leave
def pytest_collection_modifyitems(config, items):
    """Every test function still runs: what a sample misses is what only some of its parameters show."""
    most = config.getoption("--cases")
    if most is None:
        return
    if most < 1:
        raise pytest.UsageError(f"--cases {most}: expected at least 1")
    tests = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {case for cases in tests.values() for case in sample(cases, most)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def sample(cases, most):
    """``most`` of them, the first and (from two on) the last among them, the others evenly between; all if fewer."""
    steps = min(most, len(cases))
    return [cases[index * (len(cases) - 1) // max(1, steps - 1)] for index in range(steps)]


@pytest.fixture
def x64():
    """Float64 for one test: identities are proved in it, precision is measured without it."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_go_with_their_module():
    """A worker that keeps all it has ever compiled grows past 6 GB."""
    yield
    jax.clear_caches()

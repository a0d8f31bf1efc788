"""Converting by a calibrated plan takes the memory of a few layers, however many there are.

The layers have the proportions of a model of 13 billion parameters (5120 wide, 40 heads, an MLP of 13,824, keys as
wide as the model) at a sixteenth of the width: every matrix, map and peak below is 256 times smaller than there.
There a layer's weights in 16 bits are 0.6 GB and its map 0.1 GB (0.2 in float64), of 40 layers 25 and 4 (8) GB.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_llama

from slimjax.config import ModelConfig
from slimjax.models.opened import open_model
from slimjax.solve.augment import Solution
from slimjax.solve.plan import Choice, Plan
from slimjax.solve.planfile import load_plan, save_plan

HERE = Path(__file__).parent
WIDTH, HEADS, MLP, EXTRA = 5120 // 16, 40, 13_824 // 16, 16
MAP = 8 * (WIDTH + EXTRA) * WIDTH  # bytes in float64
LAYER = 4 * (4 * WIDTH**2 + 3 * WIDTH * MLP)  # bytes of weights in float32
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="/proc/self/status, which tells memory, is Linux's"
)


def write(folder, layers):
    """A model of so many equal layers, and a plan that has a map for each."""
    folder.mkdir()
    sizes = {"vocab": 300, "width": WIDTH, "mlp_width": MLP, "max_length": 64, "norm_epsilon": 1e-5}
    config = ModelConfig(**sizes, layers=layers, heads=HEADS, kv_heads=HEADS, head_dim=WIDTH // HEADS)
    tiny_llama.write_huggingface(folder / "model", "llama", config=config, dtype="float16")
    model, rng = open_model(folder / "model"), np.random.default_rng(0)
    solutions = {
        place.name: Solution(
            weight=rng.standard_normal((WIDTH + EXTRA, WIDTH)),
            extra=rng.standard_normal((WIDTH, EXTRA)),
            how="noise-aware",
        )
        for place in model.places
    }
    scheme = f"k:int16+{EXTRA}"
    line = {"scheme": scheme, "error": 1e-3, "bytes_per_token": 700.0, "weight_bytes": 0, "reason": ""}
    plan = Plan(
        layers=tuple(Choice(name=name, how="noise-aware", **line) for name in solutions),
        digest=model.digest,
        budget={"max_error": 1.0},
        calibration="noise",
        kv_bytes_per_token=4 * WIDTH * layers,
        solutions=solutions,
    )
    save_plan(folder / "plan.json", plan)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory")
    return {layers: write(path / str(layers), layers) for layers in (1, 4, 16)}


@pytest.mark.slow
def test_memory_grows_with_a_layer_and_not_with_their_number(folders):
    """Quadruple the layers: a quarter of them or all, their maps (or weights) together would show."""
    # Freed arrays go back to the system at once, so that they do not count.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, HERE / "peak_memory.py", *map(str, folders.values())],
        env=os.environ | settings | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, few, many = json.loads(done.stdout)
    assert many - few < 4 * MAP  # twelve more maps together: 12 * MAP, or half that in float32
    assert many < 4 * LAYER  # times 256: 5 GB for 13 billion parameters, which in 16 bits are 26 GB
    for folder in folders.values():
        held = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))
        maps = (folder / "plan.safetensors").stat().st_size
        assert held > maps  # they were written


def test_maps_are_read_when_asked_for(folders):
    """As many as are alive are held by who asked; the plan itself holds none."""
    plan = load_plan(folders[4] / "plan.json")
    first, again = (plan.solutions["layer.0"] for _ in range(2))
    assert first is not again
    np.testing.assert_array_equal(first.weight, again.weight)
    assert len(plan.solutions) == 4

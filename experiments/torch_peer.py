"""The decoder of `slimjax.models.decoder` in plain PyTorch eager, with our weights: what the benches run against.

Its fastest ordinary form: fused AdamW, `scaled_dot_product_attention`, weights read once per product, a KV cache
that is allocated once. Imported only where torch is installed.
"""

# pyright: reportMissingImports=false, reportUnnecessaryTypeIgnoreComment=false
# torch is an extra: types are checked without it too.

import contextlib
import itertools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import torch
from flax import nnx
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimjax.config import ModelConfig, TrainConfig
from slimjax.models.layers import EPSILON

if TYPE_CHECKING:
    from experiments.decode_peers import Sizes

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": functional.silu,
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
}


class Peer:
    """Functions over a dict of tensors, named as our parameters' paths: `blocks.0.mlp.up.kernel`.

    Raises NotImplementedError for a config that it does not cover.
    """

    def __init__(self, config: ModelConfig, params: nnx.State, *, train: bool, device: str = "cpu"):
        if config.position not in ("none", "rope") or config.window or config.rope_interleaved:
            raise NotImplementedError(
                f"the PyTorch peer has no position {config.position!r}, window or interleaved RoPE: use none or rope"
            )
        self.config, self.device = config, device
        self.weights = {
            ".".join(map(str, path)): self._tensor(path, leaf[...], train)
            for path, leaf in nnx.to_flat_state(params)
        }

    def _tensor(self, path: tuple[Any, ...], leaf: jax.Array, train: bool) -> Tensor:
        array = np.array(leaf)
        if "attention" in path:  # heads beside each other: one matrix, as torch has it
            array = array.reshape(-1, array.shape[-1]) if path[-2] == "out" else _joined(array, path[-1])
        if path[-1] == "kernel":
            array = np.ascontiguousarray(array.T)  # [out, in], as torch.nn.Linear has it
        return torch.tensor(array, device=self.device, requires_grad=train)

    # Forward ----------------------------------------------------------------------------------------------

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.kernel"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale, bias = self.weights[f"{name}.scale"], self.weights.get(f"{name}.bias")
        if self.config.norm == "layernorm":
            return functional.layer_norm(x, x.shape[-1:], scale, bias, EPSILON)
        return functional.rms_norm(x, x.shape[-1:], scale, EPSILON)

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of RoPE, [length, H/2] each."""
        size = self.config.H
        frequency = self.config.rope_theta ** (-np.arange(0, size, 2) / size)
        angle = np.arange(length)[:, None] * frequency[None]
        cos, sin = (torch.tensor(part, dtype=torch.float32) for part in (np.cos(angle), np.sin(angle)))
        return cos.to(self.device), sin.to(self.device)

    def _rotate(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        if self.config.position != "rope":
            return x
        (cos, sin), (first, second) = angles, x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _heads(self, x: Tensor, name: str, heads: int) -> Tensor:
        batch, tokens, _ = x.shape
        return self._linear(x, name).view(batch, tokens, heads, self.config.H).transpose(1, 2)

    def forward(
        self,
        tokens: Tensor,
        angles: tuple[Tensor, Tensor],
        caches: list[tuple[Tensor, Tensor]] | None = None,
        start: int = 0,
    ) -> Tensor:
        """Logits [B, T, V]; the tokens stand at start.. and are written to the caches [B, K, C, H], if any."""
        config, (batch, length) = self.config, tokens.shape
        h = functional.embedding(tokens, self.weights["embedding"])
        here = (angles[0][start : start + length], angles[1][start : start + length])
        for index in range(config.layers):
            name = f"blocks.{index}"
            x = self._norm(h, f"{name}.attention_norm")
            q = self._rotate(self._heads(x, f"{name}.attention.query", config.heads), here)
            k = self._rotate(self._heads(x, f"{name}.attention.key", config.K), here)
            v = self._heads(x, f"{name}.attention.value", config.K)
            if caches is not None:
                for cache, rows in zip(caches[index], (k, v), strict=True):
                    cache[:, :, start : start + length] = rows
                k, v = (cache[:, :, : start + length] for cache in caches[index])
            out = functional.scaled_dot_product_attention(
                q, k, v, is_causal=length > 1, enable_gqa=config.heads > config.K
            )
            out = out.transpose(1, 2).reshape(batch, length, config.heads * config.H)
            h = h + self._linear(out, f"{name}.attention.out")
            x = self._norm(h, f"{name}.mlp_norm")
            up, act = self._linear(x, f"{name}.mlp.up"), _ACTIVATIONS[config.mlp]
            gated = act(self._linear(x, f"{name}.mlp.gate")) * up if config.mlp == "swiglu" else act(up)
            h = h + self._linear(gated, f"{name}.mlp.down")
        table = self.weights["embedding" if config.tied else "unembedding"]
        return functional.linear(self._norm(h, "norm"), table)

    # Programs ---------------------------------------------------------------------------------------------

    def training_step(
        self, config: TrainConfig, rates: Callable[[int], float]
    ) -> Callable[[np.ndarray], float]:
        """A step on tokens [B, T+1] that returns the loss before it: as `slimjax.train` takes it, float32.

        Raises NotImplementedError for accumulation, another dtype or a conditioning penalty.
        """
        if config.accumulation > 1 or config.dtype != "float32" or config.conditioning_penalty:
            raise NotImplementedError("the PyTorch peer trains in float32, without accumulation or a penalty")
        decayed = [w for name, w in self.weights.items() if "kernel" in name or "embedding" in name]
        others = [w for name, w in self.weights.items() if not ("kernel" in name or "embedding" in name)]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)
        angles, taken = self.angles(config.length), 0

        def step(batch: np.ndarray) -> float:
            nonlocal taken
            tokens = torch.from_numpy(batch).long().to(self.device)
            for group in optimizer.param_groups:
                group["lr"] = rates(taken)
            taken += 1
            optimizer.zero_grad()
            logits = self.forward(tokens[:, :-1], angles)
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            if config.clip is not None:
                torch.nn.utils.clip_grad_norm_(list(self.weights.values()), config.clip)
            optimizer.step()
            return float(loss.detach())

        return step

    @torch.inference_mode()
    def generate(self, prompts: np.ndarray, new: int) -> np.ndarray:
        """Greedy continuation [B, new] of prompts [B, P] of equal length."""
        config, (batch, length) = self.config, prompts.shape
        capacity = length + new
        caches = [
            tuple(torch.empty(batch, config.K, capacity, config.H, device=self.device) for _ in "kv")
            for _ in range(config.layers)
        ]
        angles, tokens = self.angles(capacity), torch.from_numpy(prompts).long().to(self.device)
        drawn: list[Tensor] = []
        for index in range(new):
            start = 0 if index == 0 else length + index - 1
            tokens = self.forward(tokens, angles, caches, start)[:, -1:].argmax(dim=-1)  # type: ignore[arg-type]
            drawn.append(tokens)
        return torch.cat(drawn, dim=1).cpu().numpy()


def _joined(array: np.ndarray, kind: str) -> np.ndarray:
    return array.reshape(array.shape[0], -1) if kind == "kernel" else array.reshape(-1)


def use_threads(count: int) -> None:
    """As many CPU threads as JAX has: the cores this process may use, unless `count` says otherwise (0)."""
    torch.set_num_threads(count or len(os.sched_getaffinity(0)))


def attention(
    sizes: "Sizes", device: str, backend: str | None
) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    """Decode steps in SDPA's own layout, [B, N, S, H], and what waits for their results.

    Raises NotImplementedError where the backend of SDPA, a name of `torch.nn.attention.SDPBackend`, does not take them.
    """
    dtype, wait = getattr(torch, sizes.dtype), torch.cuda.synchronize if device == "cuda" else lambda: None
    shape = (sizes.batch, sizes.kv_heads, sizes.context, sizes.head_dim)

    def rows() -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    query = torch.randn((sizes.batch, sizes.heads, 1, sizes.head_dim), device=device, dtype=dtype)
    turn = itertools.cycle([(rows(), rows()) for _ in range(sizes.caches)])
    grouped = sizes.heads > sizes.kv_heads

    def steps() -> list[Tensor]:
        chosen = sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext()
        with torch.inference_mode(), chosen:
            return [
                functional.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)
                for keys, values in itertools.islice(turn, sizes.steps)
            ]

    try:
        call = _graph(steps) if device == "cuda" else steps
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # "No available kernel"
        raise NotImplementedError(f"torch's {backend or 'SDPA'}: {error}") from None
    return call, lambda _: wait()


def _graph(steps: Callable[[], Any]) -> Callable[[], Any]:
    """The same as one CUDA graph: what is launched one by one waits for the CPU."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        steps()  # what is allocated or compiled at the first call is no part of the graph
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX's threads may do as they like
        results = steps()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def give_back() -> None:
    """Memory of arrays that are no more, to the device: another framework may want it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Time a training step of a LLaMA-like model with random weights, with each implementation of attention.

Place in the flow: workload, clocks -> **step** -> attention (the benchmark), which has the command.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernels.clocks import Setting, first_line, wait
from benchmarks.kernels.workload import Case, visibility_of
from gisting.attention import interval_attention
from gisting.measure.rows import spread

STEP_IMPLEMENTATIONS = ("triton", "flex", "sdpa")
# Relative, in the norm. Rounding to 16 bits through a model gives a few per cent; a wrong mask gives about 1.
MAX_DIFFERENCE = 0.2


def step_case(*, is_smoke: bool) -> tuple[Case, dict[str, Any]]:
    """Return the batch, and the configuration of a model sized like LLaMA 3.2 1B with a smaller vocabulary."""
    if is_smoke:
        case = Case("step/smoke", "gist", 48, 1, 4, 2, 16, num_gist=2)
        sizes = {"num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 61}
    else:
        case = Case("step/llama-1b", "gist", 2048, 4, 32, 8, 64)
        sizes = {"num_hidden_layers": 16, "intermediate_size": 8192, "vocab_size": 32_000}
    return case, {
        "hidden_size": case.heads * case.head_size,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.groups,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        **sizes,
    }


@contextlib.contextmanager
def attention_through(impl: str) -> Iterator[None]:
    """Run every interval attention of a model with ``impl``.

    The implementation is passed explicitly because the choice of ``impl="auto"`` is cached on the mask.
    """
    # `new`, not `wraps`: a mock would keep a reference to every tensor that it is called with.
    with mock.patch("gisting.models.registry.interval_attention", functools.partial(interval_attention, impl=impl)):
        yield


@dataclass(frozen=True)
class Trained:
    """A model with random weights, and a function that runs forward and backward on its batch."""

    model: Any
    backward: Callable[[], None]


def trained_model(device: torch.device, *, is_smoke: bool, num_layers: int | None = None) -> Trained:
    """Make the model of the step, or one of the same sizes with fewer layers."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from gisting.models.registry import register_attention

    case, sizes = step_case(is_smoke=is_smoke)
    if num_layers is not None:
        sizes["num_hidden_layers"] = num_layers
    register_attention()
    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(
            LlamaConfig(**sizes), attn_implementation="gist", dtype=torch.bfloat16
        )
    model.train()
    visibility = visibility_of(case, device)
    ids = torch.randint(0, sizes["vocab_size"], (case.batch, case.num_rows), device=device)
    mask = visibility.as_attention_mask()

    def backward() -> None:
        loss = model(
            input_ids=ids, attention_mask=mask, position_ids=visibility.position_ids, labels=ids, use_cache=False
        ).loss
        loss.backward()

    return Trained(model, backward)


def compile_step(device: torch.device, impl: str, *, is_smoke: bool) -> None:
    """Compile what the step needs of an implementation. One layer is enough, because all have the same shapes."""
    # Forget the lengths that this process compiled before; otherwise the step's lengths would become dynamic.
    torch._dynamo.reset()
    with attention_through(impl):
        trained_model(device, is_smoke=is_smoke, num_layers=1).backward()


def run_step(setting: Setting, *, is_smoke: bool) -> list[dict[str, Any]]:
    """Measure time and peak memory of forward, backward and AdamW with each implementation, alternating on one model.

    Before that, each runs one backward pass. If the gradient of the first layer's value projection differs from that
    with triton by more than ``MAX_DIFFERENCE``, its row says "failed". (The loss would not show an error: with random
    weights it is the logarithm of the vocabulary under any mask.) The learning rate is 0, so all steps are equal.
    """
    device = setting.device
    case, _ = step_case(is_smoke=is_smoke)
    trained = trained_model(device, is_smoke=is_smoke)
    model, backward = trained.model, trained.backward
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=device.type == "cuda")

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    torch._dynamo.reset()
    times: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    troubles: dict[str, str] = {}
    gradients: dict[str, Tensor] = {}
    for impl in STEP_IMPLEMENTATIONS:
        try:
            with attention_through(impl):
                backward()
            gradients[impl] = model.model.layers[0].self_attn.v_proj.weight.grad.float()
        except Exception as error:  # noqa: BLE001  a failure is a result, with its reason
            troubles[impl] = first_line(error)
        optimizer.zero_grad(set_to_none=True)
    troubles |= differing(gradients)
    gradients.clear()
    for number in range(setting.warmup + setting.repeats):
        for impl in STEP_IMPLEMENTATIONS:
            if impl in troubles:
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            wait(device)
            start = time.perf_counter()
            try:
                with attention_through(impl):
                    step()
                wait(device)
            except Exception as error:  # noqa: BLE001  a failure is a result, with its reason
                troubles[impl] = first_line(error)
                optimizer.zero_grad(set_to_none=True)
                continue
            if number >= setting.warmup:
                times.setdefault(impl, []).append(1000 * (time.perf_counter() - start))
                if device.type == "cuda":
                    peaks[impl] = max(peaks.get(impl, 0), torch.cuda.max_memory_allocated(device))
    about = {**case.to_row(), "num_parameters": sum(p.numel() for p in model.parameters()), **setting.about}
    return [
        {**step_row(impl, times.get(impl, []), peaks.get(impl), troubles.get(impl)), **about}
        for impl in STEP_IMPLEMENTATIONS
    ]


def differing(gradients: dict[str, Tensor]) -> dict[str, str]:
    """Find the implementations whose gradient differs from the gradient with triton, and say by how much."""
    if "triton" not in gradients:
        return {}
    exact, found = gradients["triton"], {}
    for impl, gradient in gradients.items():
        difference = ((gradient - exact).norm() / exact.norm()).item()
        if not difference <= MAX_DIFFERENCE:  # NaN differs
            found[impl] = f"a gradient differs from triton's by {difference:.2f}, allowed {MAX_DIFFERENCE}"
    return found


def step_row(impl: str, times: Sequence[float], peak: int | None, trouble: str | None) -> dict[str, Any]:
    """Make the row of an implementation."""
    row: dict[str, Any] = {"implementation": impl}
    if trouble is not None:
        return {**row, "status": "failed", "reason": trouble}
    low, median, high = spread(times)
    return {
        **row,
        "status": "measured",
        "step_ms": median,
        "step_ms_low": low,
        "step_ms_high": high,
        "peak_bytes": peak,
        "num_repeats": len(times),
    }

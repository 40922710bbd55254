"""Two processes train like one: the same global batch gives the same losses and weights, under DDP and FSDP2.

This file is also the script that the processes run, on a CPU, over gloo. No test needs an accelerator.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedModel, TrainerCallback, set_seed

import gisting
from gisting import Record
from gisting.train.finetune import finetune, published_arguments
from gisting.train.objective import Objective
from tests import tiny
from tests.repository import fresh_python

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 20

pytestmark = [
    pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate"),
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
    ),
]


class Seen(TrainerCallback):
    """Record the losses of a run, the type of its parameters and the rows of its forward passes."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.parameter = ""
        self.num_rows: set[int] = set()

    def on_train_begin(self, args, state, control, model: PreTrainedModel | None = None, **kwargs):
        assert model is not None
        self.parameter = type(next(model.parameters())).__name__
        model.register_forward_pre_hook(
            lambda module, args, kwargs: self.num_rows.add(len(kwargs["input_ids"])), with_kwargs=True
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs["loss"]] if logs and "loss" in logs else []


def train(output: Path, name: str, kind: str) -> None:
    """Train for 20 steps of 8 rows. Completions differ in length, so processes differ in their number of targets."""
    torch.set_num_threads(1)
    set_seed(0)
    model, tokenizer = tiny.patched(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(5)
    records = [
        Record(f"w{number} w{number + 1}", tiny.words(1 + number % 3, number), tiny.words(1 + number % 5, number))
        for number in range(48)
    ]
    changes: dict[str, Any] = {}
    if kind.startswith("fsdp2"):
        config = yaml.safe_load((ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text(encoding="utf-8"))
        changes = {"fsdp": True, "fsdp_config": config["fsdp_config"]}
    arguments = published_arguments(
        output,
        batch_size=8,
        max_steps=NUM_STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ddp_find_unused_parameters=False,
        **changes,
    )
    if kind in ("fsdp2", "fsdp2-distilled"):
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        # accelerate only shards on accelerators, but torch, which does the sharding, can do it on a CPU, too.
        assert arguments.parallel_mode
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    seen = Seen()
    settings: dict[str, Any] = {
        "objective": Objective(distillation=1.0) if kind.endswith("distilled") else Objective(),
        "method": "gist-lora" if "gist-lora" in kind else "full",
    }
    # k is drawn from the batch, which differs between processes, so here it is the same for all rows.
    finetune(model, tokenizer, records, arguments, num_gist_tokens=2, callbacks=[seen], **settings)
    if arguments.process_index == 0:
        found = {**vars(seen), "num_rows": sorted(seen.num_rows), "num_processes": arguments.world_size}
        (output / "seen.json").write_text(json.dumps(found), encoding="utf-8")


def launch(output: Path, name: str, kind: str, num_processes: int) -> subprocess.CompletedProcess[str]:
    module = ["-m", "tests.test_distributed", str(output), name, kind]
    if num_processes > 1:
        module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), *module]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.run(
        [sys.executable, *module], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110
    )


def seen_in(output: Path) -> dict[str, Any]:
    return json.loads((output / "seen.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Train a model in this process, once."""

    @cache
    def trained(name: str) -> Path:
        output = tmp_path_factory.mktemp("alone") / name
        train(output, name, {"llama": "one-distilled", "t5": "one"}[name])
        return output

    return trained


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "ddp-distilled"),
        pytest.param("llama", "fsdp2-distilled", marks=pytest.mark.slow),
        pytest.param("t5", "fsdp2", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_like_one(tmp_path: Path, alone: Callable[[str], Path], name: str, kind: str) -> None:
    """With distillation, one number holds the language model's loss and the divergence."""
    done = launch(tmp_path, name, kind, 2)
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = seen_in(alone(name)), seen_in(tmp_path)
    assert (one["num_processes"], one["num_rows"]) == (1, [8])
    assert (two["num_processes"], two["num_rows"]) == (2, [4])
    # Weights are really sharded.
    assert two["parameter"] == {"ddp": "Parameter", "fsdp2": "DTensor"}[kind.removesuffix("-distilled")]
    assert len(two["losses"]) == NUM_STEPS
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5, abs=0)
    assert one["losses"][-1] < one["losses"][0] - 0.3
    # Loaded, because weights gathered from shards hold tied weights under each of their names.
    expected, found = (gisting.load(output)[0].state_dict() for output in (alone(name), tmp_path))
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_an_adapter_like_one(tmp_path: Path) -> None:
    """With split-off prompts: a step has three forward passes, of which one has gradients."""
    adapters, losses = [], []
    for number in (1, 2):
        output = tmp_path / str(number)
        done = launch(output, "llama", "ddp-gist-lora-distilled", number)
        assert done.returncode == 0, done.stderr[-4000:]
        losses.append(seen_in(output)["losses"])
        adapters.append(load_file(output / "gist_adapter.safetensors"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=0)
    assert losses[0][-1] < losses[0][0]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_sharding_is_refused_where_it_would_be_ignored(tmp_path: Path) -> None:
    """accelerate only shards on accelerators; without one, it silently trains on whole weights."""
    done = launch(tmp_path, "llama", "fsdp2-unsupported", 2)
    assert done.returncode != 0
    assert "fsdp was requested, but accelerate only shards on accelerators" in done.stderr


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # threads of gloo that are still running at exit abort the process


_SHARDED = """
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from gisting.models.weights import to_dtype

    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.register_buffer("frequencies", torch.ones(3))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    model(torch.randn(2, 8)).sum().backward()
    to_dtype(model, torch.bfloat16)
    print(*sorted(f"{name} {getattr(t, 'full_tensor', lambda: t)().dtype}" for name, t in model.state_dict().items()))
"""


def test_sharded_weights_are_written_in_the_type_of_the_base() -> None:
    """What is written is the state dict, which an assignment to ``parameter.data`` would not reach."""
    expected = [f"{number}.{kind} torch.bfloat16" for number in (0, 1) for kind in ("bias", "weight")]
    assert fresh_python(_SHARDED).split(" ") == " ".join([*expected, "frequencies torch.float32"]).split(" ")

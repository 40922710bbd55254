"""Recipes: a strict schema, published values, overrides, and runs that describe themselves and can be killed."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import TrainerCallback

import gisting
from gisting import GistCollator, GistError, Record
from gisting.data.packing import GistPackingCollator
from gisting.data.records import save_records
from gisting.train.finetune import PUBLISHED, finetune, published_arguments
from gisting.train.recipe import Recipe, load_recipe, train_recipe
from gisting.train.repeat import RepeatableDraws, checkpoint_to_resume
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
RECORDS = [Record(f"w{number} w{number + 1}", "w50", tiny.words(1 + number % 4, number)) for number in range(24)]


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny patched model, in a folder with records."""
    model, tokenizer = tiny.patched("llama", attention_dropout=0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(5)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    save_records(RECORDS, tmp_path / "train.jsonl")
    return tmp_path / "model"


def recipe_for(checkpoint: Path, **changes: Any) -> Recipe:
    settings = {
        "model": str(checkpoint),
        "data": str(checkpoint.parent / "train.jsonl"),
        "num_gist_tokens": "1:3",
        "conditions": {"gist": 3, "positive": 1},
        "max_steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    return Recipe(**{**settings, **changes})


def losses(output_dir: Path, step: int) -> list[float]:
    history = json.loads((output_dir / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


# -- the schema --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step: 3", r"recipe.yaml, line 1: there is no setting 'max_step'; did you mean max_steps\?"),
        ("xyzzy: 3", "there is no setting 'xyzzy'; choose from model, data, "),
        ("seed: 1\nseed: 2", "line 2: seed is given twice, first in line 1; remove one"),
        ("model: m\nbatch_size: 0", "line 2: batch_size must be a whole number of at least 1, got 0"),
        ("batch_size: 1.5", "batch_size must be a whole number of at least 1, got 1.5"),
        ("batch_size: true", "batch_size must be a whole number of at least 1, got True"),
        ("learning_rate: fast", "learning_rate must be a number above 0, got 'fast'"),
        ("learning_rate: -1.0", "learning_rate must be a number above 0, got -1.0"),
        ("learning_rate: .nan", "learning_rate must be a number above 0, got nan"),
        ("weight_decay: -0.1", "weight_decay must be a number of at least 0, got -0.1"),
        ("bf16: no", "bf16 must be true or false, got 'no'"),
        ("bf16: maybe", "bf16 must be true or false, got 'maybe'"),
        ("dtype: int8", "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type must be one of linear, cosine, "),
        ("method: lor", "method must be one of full, lora, "),
        ("num_gist_tokens: 3:1", "num_gist_tokens must be a number or a range such as 1:10, got '3:1'"),
        ("columns: question", "columns must be names such as instruction=question,output=answer, got 'question'"),
        ("num_gist_tokens: 0", "num_gist_tokens must be a number or a range such as 1:10, got 0"),
        ("conditions: {gits: 1}", "conditions must be names of gist, positive, negative, with weights"),
        ("conditions: {gist: -1}", "conditions must be names of gist, positive, negative, with weights"),
        ("eval: {a: b}", "eval must be a list of texts, got {'a': 'b'}"),
        ("model: 3", "model must be a text, got 3"),
        ("epochs: 1\nmax_steps: 3", "epochs and max_steps cannot be combined, got 1 and 3; leave one out"),
        ("- model", "must hold one 'name: value' per line, got list"),
        ("", "must hold one 'name: value' per line, got NoneType"),
        ("model: [", "recipe.yaml is not valid YAML: while parsing"),
        ("[a]: 1", "is not valid YAML"),
    ],
)
def test_what_a_recipe_does_not_know_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(GistError, match=message):
        load_recipe(written(tmp_path, text))


def test_values_are_read_as_they_are_meant(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path, "learning_rate: 2e-5\nnum_gist_tokens: 1:10\neval: a.jsonl\nconditions: gist\nseed: null")
    )
    assert recipe.learning_rate == 2e-5  # a text in YAML 1.1
    assert recipe.num_gist_tokens == (1, 10)  # 70 in YAML 1.1, to the base of 60
    assert recipe.eval == ("a.jsonl",)
    assert recipe.conditions == {"gist": 1.0}
    assert recipe.seed == 42
    assert load_recipe(written(tmp_path, "num_gist_tokens: 3")).num_gist_tokens == (3, 3)


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    recipe = Recipe(
        model="m",
        eval=("a", "b"),
        columns="instruction=question, output=answer",
        num_gist_tokens="2:5",
        conditions={"gist": 3, "positive": 1},
        bf16=False,
    )
    assert recipe.columns == {"instruction": "question", "output": "answer"}
    recipe.save(tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe
    text = (tmp_path / "again.yaml").read_text(encoding="utf-8")
    assert text.startswith(f"# gisting {gisting.__version__}, torch {torch.__version__}")
    assert set(yaml.safe_load(text)) == {"model", "eval", "columns", "num_gist_tokens", "conditions", "bf16"}


def test_changes_override_and_steps_take_the_place_of_epochs() -> None:
    recipe = Recipe(epochs=3, seed=1)
    assert recipe.updated(seed=2, epochs=None) == Recipe(epochs=3, seed=2)
    assert recipe.updated(max_steps=5) == Recipe(max_steps=5, seed=1)
    assert recipe.updated(max_steps=5).updated(epochs=1) == Recipe(epochs=1, seed=1)
    with pytest.raises(GistError, match="cannot be combined"):
        recipe.updated(max_steps=5, epochs=1)


# -- the recipes of the repository -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read_and_gives_arguments(tmp_path: Path, path: Path) -> None:
    recipe = load_recipe(path)
    arguments = recipe.updated(bf16=False).arguments(tmp_path, is_encoder_decoder="t5" in path.stem)
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == recipe.batch_size
    assert recipe.model is not None
    assert recipe.data is not None


@pytest.mark.parametrize(("name", "kind"), [("llama-7b", "decoder"), ("flan-t5-xxl", "encoder-decoder")])
def test_published_recipes_are_the_published_ones(tmp_path: Path, name: str, kind: str) -> None:
    """The files give every published value, and the same as the code."""
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    held = {"num_train_epochs": recipe.epochs, **vars(recipe)}
    assert {key: held[key] for key in PUBLISHED[kind]} == PUBLISHED[kind]
    assert (recipe.max_length, recipe.max_target_length) == ((512, 256) if kind == "decoder" else (128, 256))
    assert (recipe.num_gist_tokens, recipe.conditions, recipe.pack_length) == ((1, 1), {"gist": 1.0}, None)
    assert [Path(split).stem.rpartition("_")[2] for split in recipe.eval] == ["seen", "unseen", "human"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path: Path) -> None:
    """accelerate and its plugins refuse unknown keys."""
    pytest.importorskip("accelerate")
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 4
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    assert str(config.distributed_type).rpartition(".")[2] == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(
        path.stem, "DEEPSPEED"
    )


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_describes_itself(tmp_path: Path, checkpoint: Path) -> None:
    """Running the saved recipe again gives the same weights."""
    train_recipe(recipe_for(checkpoint), tmp_path / "one")
    assert load_recipe(tmp_path / "one" / "recipe.yaml") == recipe_for(checkpoint)
    train_recipe(load_recipe(tmp_path / "one" / "recipe.yaml"), tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_the_command_line_overrides_the_recipe(tmp_path: Path, checkpoint: Path) -> None:
    from typer.testing import CliRunner

    from gisting.cli import app

    path = tmp_path / "given.yaml"
    recipe_for(checkpoint, epochs=3, max_steps=None).save(path)
    words = ["train", "--recipe", str(path), "--output", str(tmp_path / "out"), "-k", "2", "--max-steps", "2"]
    result = CliRunner().invoke(app, [*words, "--num-workers", "1", "--no-bf16", "--condition", "gist"])
    assert result.exit_code == 0, result.output
    expected = recipe_for(checkpoint, max_steps=2, num_gist_tokens=2, num_workers=1, bf16=False, conditions="gist")
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == expected


def test_a_run_needs_a_model_and_data(tmp_path: Path) -> None:
    with pytest.raises(GistError, match="there is no model and no data to train with; name it in the recipe or on"):
        train_recipe(Recipe(), tmp_path / "out")
    with pytest.raises(GistError, match="there is no data to train with"):
        train_recipe(Recipe(model="m"), tmp_path / "out")
    with pytest.raises(GistError, match="out holds no checkpoint to resume from; start without resume"):
        train_recipe(Recipe(model="m", data="d.jsonl"), tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


def test_a_report_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(GistError, match="report_to: nowhere is not installed"):
        Recipe(report_to="nowhere").arguments(tmp_path)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_reports_go_to_tensorboard(tmp_path: Path, checkpoint: Path) -> None:
    train_recipe(recipe_for(checkpoint, report_to="tensorboard", max_steps=1), tmp_path / "out")
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))


# -- killed and resumed ------------------------------------------------------------------------------------------------

_KILLED = """
    import sys, torch
    from pathlib import Path
    from transformers import TrainerCallback
    from gisting.train.recipe import load_recipe, train_recipe

    class Slow(TrainerCallback):  # leaves time to be killed in
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step > 8:
                Path(args.output_dir, "reached").touch()
                __import__("time").sleep(60)

    torch.set_num_threads(1)
    train_recipe(load_recipe(sys.argv[1]), sys.argv[2], callbacks=[Slow()])
"""


@pytest.mark.slow
def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path: Path, checkpoint: Path) -> None:
    """Killed with SIGKILL after its second checkpoint, with an incomplete third one, a run has the same losses and
    weights to the bit; with k and condition drawn for each row, dropout, two workers, accumulation and a second epoch.
    """
    recipe = recipe_for(checkpoint, max_steps=12, save_steps=4, per_device_batch_size=2, num_workers=2)
    recipe.save(tmp_path / "given.yaml")
    train_recipe(recipe, tmp_path / "whole")

    command = [sys.executable, "-c", textwrap.dedent(_KILLED), str(tmp_path / "given.yaml"), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "killed" / "reached").exists():
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    torn = tmp_path / "killed" / "checkpoint-12"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half of a file")

    train_recipe(recipe, tmp_path / "killed", resume=True)
    assert losses(tmp_path / "killed", 12) == losses(tmp_path / "whole", 12)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("state", "generators", "is_whole"),
    [
        ('{"global_step": 20}', True, True),
        ('{"global_step": 20}', False, False),
        ('{"global_st', True, False),
        ("", True, False),
        (None, True, False),
    ],
)
def test_an_incomplete_checkpoint_is_skipped(
    tmp_path: Path, state: str | None, generators: bool, is_whole: bool
) -> None:
    for step, text in ((9, '{"global_step": 9}'), (20, state)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    torch.save({}, tmp_path / "checkpoint-20" / "rng_state_1.pth")
    if not generators:
        path = tmp_path / "checkpoint-20" / "rng_state_1.pth"
        path.write_bytes(path.read_bytes()[:-10])
    expected = "checkpoint-20" if is_whole else "checkpoint-9"
    assert checkpoint_to_resume(tmp_path, True) == str(tmp_path / expected)
    named = str(tmp_path / "checkpoint-20")
    if is_whole:
        assert checkpoint_to_resume(tmp_path, named) == named
    else:
        with pytest.raises(GistError, match="is not a whole checkpoint"):
            checkpoint_to_resume(tmp_path, named)
    (tmp_path / "checkpoint-9" / "trainer_state.json").unlink()
    if not is_whole:
        with pytest.raises(GistError, match=r"holds no checkpoint .*\(incomplete: checkpoint-9, checkpoint-20\)"):
            checkpoint_to_resume(tmp_path, True)


def test_draws_depend_only_on_the_batch_and_the_seed(tokenizer: gisting.GistTokenizer) -> None:
    collator = GistCollator(tokenizer, (1, 8), conditions={"gist": 1, "positive": 1})

    def drawn(seed: int, records: list[Record]) -> tuple[list[int], list[Any]]:
        batch = RepeatableDraws(collator, seed)(records)
        return (batch["input_ids"] == tokenizer.gist_token_id).sum(1).tolist(), batch["attention_mask"].tolist()

    first = drawn(0, RECORDS[:8])
    state = torch.get_rng_state()
    assert drawn(0, RECORDS[:8]) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn(1, RECORDS[:8]) != first
    assert drawn(0, RECORDS[7::-1])[0] != first[0][::-1]
    counts = [count for start in range(0, 24, 4) for count in drawn(0, RECORDS[start : start + 4])[0]]
    assert len(set(counts)) > 4


# -- what Trainer offers -----------------------------------------------------------------------------------------------


class Batches(TrainerCallback):
    """The losses of a run, the widths of the batches that the model was given, and its last weights."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.widths: list[int] = []
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: self.widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs["loss"]] if logs and "loss" in logs else []

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.remove()


def trained(
    output: Path,
    records: Any = RECORDS,
    *,
    name: str = "llama",
    k: int | tuple[int, int] = (1, 3),
    pack_length: int | None = None,
    **changes: Any,
) -> Batches:
    model, tokenizer = tiny.patched(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(5)
    settings: dict[str, Any] = {
        "batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    seen = Batches()
    arguments = published_arguments(output, **{**settings, **changes})
    lengths = {"max_length": 48, "pack_length": pack_length}
    finetune(model, tokenizer, records, arguments, num_gist_tokens=k, callbacks=[seen], **lengths)
    seen.weights = model.state_dict()
    return seen


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [GistCollator, GistPackingCollator])
def test_batches_are_the_same_in_workers(
    tokenizer: gisting.GistTokenizer, method: str, kind: type[GistCollator]
) -> None:
    """Collator and tokenizer are pickled for a worker, which draws the same as this process."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    collator = RepeatableDraws(kind(tokenizer, (1, 4), max_length=40), 3)
    loader = DataLoader(
        RECORDS,  # pyright: ignore[reportArgumentType]
        batch_size=6,
        collate_fn=collator,
        num_workers=2,
        multiprocessing_context=method,
    )
    here = [collator(RECORDS[start : start + 6]) for start in range(0, 24, 6)]
    for batch, expected in zip(loader, here, strict=True):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], tensor) for name, tensor in expected.items())


def test_a_stream_is_trained_on_as_the_list_is(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [asdict(record) for record in RECORDS]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    assert trained(tmp_path, stream).losses == trained(tmp_path, rows, train_sampling_strategy="sequential").losses
    assert len(trained(tmp_path, stream, pack_length=48).losses) == 6
    with pytest.raises(GistError, match="records is a stream, whose length is unknown; set max_steps"):
        trained(tmp_path, stream, max_steps=-1)
    with pytest.raises(GistError, match="'group_by_length', but a stream cannot be sorted; leave it at 'random'"):
        trained(tmp_path, stream, train_sampling_strategy="group_by_length")


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_every_epoch_draws_new_values(tmp_path: Path, kind: str) -> None:
    """The same batches come in the same order; the width of a row shows its k."""
    datasets = pytest.importorskip("datasets")
    rows = [asdict(record) for record in RECORDS[:8]]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    settings = {} if kind == "stream" else {"train_sampling_strategy": "sequential"}
    settings |= {"batch_size": 1, "per_device_batch_size": 1, "max_steps": 24, "k": (1, 8)}
    records = stream if kind == "stream" else rows
    widths = trained(tmp_path, records, **settings).widths
    epochs = [widths[start : start + 8] for start in (0, 8, 16)]
    assert all(one != other for one, other in itertools.combinations(epochs, 2))
    assert widths == trained(tmp_path, records, **settings).widths


def test_a_finished_run_is_not_trained_on(checkpoint: Path, tmp_path: Path) -> None:
    """Its last checkpoint is in the middle of an epoch, where stock Trainer would take one more step."""
    recipe = recipe_for(checkpoint, max_steps=5, save_steps=5)
    train_recipe(recipe, tmp_path / "out")
    before = load_file(tmp_path / "out" / "model.safetensors")
    again = train_recipe(recipe, tmp_path / "out", resume=True)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert math.isnan(again.metrics["train_loss"])


def test_rows_of_a_batch_are_about_equally_long(tmp_path: Path) -> None:
    """An eighth of the records is long, and is in a few of the 32 batches; Trainer sorts within eight batches."""
    pytest.importorskip("datasets")
    records = [Record("w1", "w2", tiny.words(40 if number % 8 == 0 else 2, number)) for number in range(128)]
    settings: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    assert sum(width > 20 for width in trained(tmp_path, records, max_steps=32, **settings).widths) <= 8
    assert sum(width > 20 for width in trained(tmp_path, records, max_steps=32).widths) > 8
    with pytest.raises(GistError, match="'group_by_length', but packed rows are equally long"):
        trained(tmp_path, records, pack_length=48, **settings)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"dataloader_num_workers": 2}, 0.0),
        ({"bf16": True}, 2e-2),
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, 0.0, marks=pytest.mark.slow),
    ],
    ids=["workers", "bf16", "compile"],
)
def test_options_of_trainer_give_the_losses_of_the_plain_run(
    tmp_path: Path, changes: dict[str, Any], tolerance: float
) -> None:
    """bfloat16 has eight bits: a few times 2 ** -8 of a loss, over a few steps."""
    losses, expected = trained(tmp_path, **changes).losses, trained(tmp_path).losses
    assert losses == pytest.approx(expected, rel=tolerance, abs=0)
    assert len(losses) == 6
    assert (losses == expected) is (tolerance == 0)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_accumulated_passes_give_the_losses_and_weights_of_one(tmp_path: Path, name: str) -> None:
    """Rows differ in their number of targets, so a mean of means would differ, and a sum even more. With SGD, because
    Adam ignores the size of gradients.
    """
    settings: dict[str, Any] = {"name": name, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.3, "k": 2}
    once = trained(tmp_path, **settings)
    often = trained(tmp_path, per_device_batch_size=1, **settings)
    assert often.losses == pytest.approx(once.losses, rel=1e-5, abs=0)
    for key, tensor in once.weights.items():
        torch.testing.assert_close(often.weights[key], tensor, rtol=1e-4, atol=1e-5)

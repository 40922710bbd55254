"""Weight differences: what is added, what is checked, and what remains after a failure."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import gisting
from gisting.errors import GistError
from gisting.models import hub
from gisting.models import weight_difference as module
from gisting.models.fingerprint import fingerprint
from gisting.models.load import trained_num_gist_tokens
from gisting.models.published import ALPACA_STRIPPED, PUBLISHED, PublishedCheckpoint
from gisting.models.weight_difference import apply_weight_difference, looks_like_difference
from gisting.tokens import GistTokenizer
from tests import shell, tiny
from tests.memory import peak_growth_mb, requires_peak
from tests.repository import fences_in

NUM_LAYERS, HEAD_DIM = 3, 8
ROWS = len(tiny.VOCABULARY)
INV_FREQ = 1.0 / (10000.0 ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM))
# Changes the sum of a base model by much more than the tolerance.
SHIFT = 0.01


def frequencies(value: Tensor) -> dict[str, Tensor]:
    return {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": value.clone() for layer in range(NUM_LAYERS)}


def save_bins(tensors: dict[str, Tensor], folder: Path, num_files: int) -> None:
    """Save a checkpoint as transformers did in 2023: pickled, in order, with an index."""
    names = list(tensors)
    size = -(-len(names) // num_files)
    places = {}
    for number in range(num_files):
        file = f"pytorch_model-{number + 1:05}-of-{num_files:05}.bin"
        part = names[number * size : (number + 1) * size]
        torch.save({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def save_safetensors(tensors: dict[str, Tensor], folder: Path, num_files: int) -> None:
    names = list(tensors)
    places = {name: f"model-{number % num_files:05}.safetensors" for number, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


class Layout:
    """A small base model, and the difference to a trained one in the published layout."""

    def __init__(self, folder: Path) -> None:
        self.base, self.difference, self.output = folder / "base", folder / "difference", folder / "output"
        base = tiny.model("llama-untied")
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        base.half().save_pretrained(self.base)
        tiny.word_tokenizer().save_pretrained(self.base)
        self.originals = load_file(self.base / "model.safetensors")
        self.changes = {
            name: torch.randn(tensor.shape if tensor.shape[0] != ROWS else (ROWS + 1, *tensor.shape[1:])) * 1e-3
            for name, tensor in self.originals.items()
        }
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            self.changes[name][-1] = torch.randn(32)
        self.difference.mkdir()
        save_bins({**self.changes, **frequencies(torch.zeros(HEAD_DIM // 2))}, self.difference, 3)
        config = json.loads((self.base / "config.json").read_text())
        config |= {"vocab_size": ROWS + 1, "pad_token_id": -1, "bos_token_id": 0, "eos_token_id": 1}
        config |= {"torch_dtype": "float32", "transformers_version": "4.28.0.dev0"}
        config = {key: value for key, value in config.items() if key not in ("dtype", "rope_parameters")}
        (self.difference / "config.json").write_text(json.dumps(config))
        tiny.word_tokenizer(("<GIST>",)).save_pretrained(self.difference)

    def expected(self) -> dict[str, Tensor]:
        """Compute the trained model's tensors in float32."""
        found = {}
        for name, change in self.changes.items():
            original = torch.zeros_like(change)
            original[: self.originals[name].shape[0]] = self.originals[name].float()
            found[name] = change + original
        return found

    def sum(self) -> float:
        """Sum all weights and the rotary frequencies of each layer, as the published script does."""
        total = sum(float(tensor.double().sum()) for tensor in self.expected().values())
        return total + NUM_LAYERS * float(INV_FREQ.double().sum())

    def spoil_base(self) -> None:
        self.originals["model.norm.weight"] += SHIFT
        save_file(self.originals, self.base / "model.safetensors", metadata={"format": "pt"})

    def left(self) -> list[str]:
        return sorted(path.name for path in self.base.parent.iterdir())


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


@pytest.fixture
def known(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> PublishedCheckpoint:
    """Register the difference as a published one, so that its sum is known."""
    found = PublishedCheckpoint("somebody/llama-tiny-gist-1", "gist", round(layout.sum(), 4))
    monkeypatch.setitem(PUBLISHED, found.name, found)
    return found


# -- applying ----------------------------------------------------------------------------------------------------------


def test_the_published_layout_is_added_to_the_bit(layout: Layout) -> None:
    found = apply_weight_difference(layout.difference, layout.base, layout.output)
    recovered, expected = load_file(layout.output / "model.safetensors"), layout.expected()
    assert recovered.keys() == expected.keys()  # without rotary frequencies
    assert all(torch.equal(recovered[name], expected[name]) for name in expected)
    assert found.num_parameters == sum(tensor.numel() for tensor in expected.values())
    assert found.num_added_rows == 1
    assert found.weight_sum == pytest.approx(layout.sum(), abs=1e-6)
    assert (found.expected_sum, found.dtype) == (None, "float32")
    assert layout.left() == ["base", "difference", "output"]


def test_the_gist_row_is_the_difference_itself(layout: Layout) -> None:
    apply_weight_difference(layout.difference, layout.base, layout.output)
    recovered = load_file(layout.output / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(recovered[name][-1], layout.changes[name][-1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_is_cast_after_the_sum(layout: Layout, dtype: str) -> None:
    found = apply_weight_difference(layout.difference, layout.base, layout.output, dtype=dtype)
    assert found.weight_sum == pytest.approx(layout.sum(), abs=1e-6)
    recovered = load_file(layout.output / "model.safetensors")
    assert all(torch.equal(recovered[n], tensor.to(getattr(torch, dtype))) for n, tensor in layout.expected().items())
    model, _ = gisting.load(layout.output)
    assert model.dtype == getattr(torch, dtype)


def test_frequencies_in_the_base_count_as_they_are(layout: Layout) -> None:
    """A LLaMA that was converted in 2023 has them, rounded to float16."""
    held = {**layout.originals, **frequencies(INV_FREQ.half() * 2)}
    save_file(held, layout.base / "model.safetensors", metadata={"format": "pt"})
    found = apply_weight_difference(layout.difference, layout.base, layout.output)
    extra = NUM_LAYERS * float((INV_FREQ.half() * 2).double().sum() - INV_FREQ.double().sum())
    assert found.weight_sum == pytest.approx(layout.sum() + extra, abs=1e-6)
    assert not [name for name in load_file(layout.output / "model.safetensors") if "inv_freq" in name]


def test_a_published_sum_holds_frequencies_that_no_file_has(layout: Layout, known: PublishedCheckpoint) -> None:
    """This happens if a later transformers loaded the difference and saved it again."""
    for file in layout.difference.glob("pytorch_model*"):
        file.unlink()
    save_file(layout.changes, layout.difference / "model.safetensors", metadata={"format": "pt"})
    found = apply_weight_difference(
        layout.difference, layout.base, layout.output, expected_sum=known.weight_sum, tolerance=1e-3
    )
    assert found.weight_sum == pytest.approx(layout.sum(), abs=1e-6)


def test_files_of_several_shards(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 20_000)
    done: list[tuple[int, int]] = []
    apply_weight_difference(
        layout.difference, layout.base, layout.output, on_progress=lambda *state: done.append(state)
    )
    index = json.loads((layout.output / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert sorted(path.name for path in layout.output.glob("*.safetensors")) == files
    assert done[-1][0] == done[-1][1] == index["metadata"]["total_size"]
    assert [first for first, _ in done] == sorted(first for first, _ in done)
    expected = layout.expected()
    model = AutoModelForCausalLM.from_pretrained(layout.output).state_dict()  # stock transformers
    assert all(torch.equal(model[name], expected[name]) for name in expected)


def test_bin_files_of_the_old_format(layout: Layout) -> None:
    """Files from before PyTorch 1.6 cannot be mapped. The base is a single .bin file."""
    for file in layout.difference.glob("*.bin"):
        torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    (layout.base / "model.safetensors").unlink()
    torch.save(layout.originals, layout.base / "pytorch_model.bin")
    apply_weight_difference(layout.difference, layout.base, layout.output)
    recovered, expected = load_file(layout.output / "model.safetensors"), layout.expected()
    assert all(torch.equal(recovered[name], expected[name]) for name in expected)


@requires_peak
@pytest.mark.parametrize("is_pickled", [pytest.param(True, marks=pytest.mark.slow), False], ids=["bin", "safetensors"])
def test_memory_is_that_of_a_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_pickled: bool) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 16 << 20)
    small = Layout(tmp_path / "small")
    apply_weight_difference(small.difference, small.base, small.output)  # so that imports do not count
    config = LlamaConfig(vocab_size=8)
    for folder in ("base", "difference"):
        config.save_pretrained(tmp_path / folder)
        tiny.word_tokenizer().save_pretrained(tmp_path / folder)
        tensors = {f"w{number}": torch.full((1 << 20,), 0.5) for number in range(32)}
        if is_pickled:
            save_bins(tensors, tmp_path / folder, 16)
        else:
            save_safetensors(tensors, tmp_path / folder, 16)
    with peak_growth_mb() as growth:
        found = apply_weight_difference(tmp_path / "difference", tmp_path / "base", tmp_path / "output")
        assert found.num_parameters == 32 << 20  # checkpoints of 128 MB in files of 8 MB, written in files of 16 MB
        assert growth() < 100
    assert all(load_file(file).popitem()[1].eq(1.0).all() for file in (tmp_path / "output").glob("*.safetensors"))


# -- for gisting.load --------------------------------------------------------------------------------------------------


def test_gisting_load_knows_the_recovered_checkpoint(layout: Layout, known: PublishedCheckpoint) -> None:
    found = apply_weight_difference(layout.difference, layout.base, layout.output)
    assert found.expected_sum == known.weight_sum  # recognised, though a directory has no published name
    model, tokenizer = gisting.load(layout.output)
    assert trained_num_gist_tokens(model) == (1, 1)
    assert tokenizer.template == ALPACA_STRIPPED
    assert (tokenizer.gist_token_id, tokenizer.has_own_gist_token) == (ROWS, True)
    assert torch.equal(model.get_input_embeddings().weight[-1], layout.changes["model.embed_tokens.weight"][-1])
    # The ids of the config were those of another tokenizer, and its padding the gist token's row.
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, None)
    assert model.generation_config.eos_token_id == 2
    cache = gisting.compress(model, tokenizer, ["w1 w2 w3"], 1)
    assert len(gisting.generate(model, tokenizer, ["w4"], cache=cache, max_new_tokens=4, do_sample=False)) == 1
    again = layout.output.parent / "again"
    hub.save_pretrained(model, tokenizer, again)
    assert fingerprint(gisting.load(again)[0]) == fingerprint(model)


def test_a_control_was_not_trained_to_gist(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    control = PublishedCheckpoint("somebody/llama-tiny-neg_control-1", "negative", round(layout.sum(), 4))
    monkeypatch.setitem(PUBLISHED, control.name, control)
    assert apply_weight_difference(layout.difference, layout.base, layout.output).expected_sum == control.weight_sum
    assert trained_num_gist_tokens(gisting.load(layout.output)[0]) is None


def test_a_difference_without_gist_token_gives_an_ordinary_checkpoint(layout: Layout) -> None:
    """Alpaca's difference is one: it adds a row for padding."""
    tiny.word_tokenizer(("[PAD]",)).save_pretrained(layout.difference)
    apply_weight_difference(layout.difference, layout.base, layout.output)
    model, tokenizer = gisting.load(layout.output)
    assert (tokenizer.gist_token_id, tokenizer.has_own_gist_token) == (ROWS + 1, False)
    assert tokenizer.template.name == "alpaca"
    assert trained_num_gist_tokens(model) is None


@pytest.mark.parametrize("name", [name for name, found in PUBLISHED.items() if found.is_difference])
def test_loading_a_published_difference_is_refused_before_anything_is_fetched(name: str) -> None:
    with pytest.raises(GistError, match=f"{name} is a weight difference.*gisting apply-difference {name} --base"):
        gisting.load(name)


def test_loading_a_local_difference_is_refused(layout: Layout) -> None:
    with pytest.raises(GistError, match="is a weight difference, not a model"):
        gisting.load(layout.difference)


@pytest.mark.parametrize(
    ("name", "scale", "expected"), [("llama", 1, False), ("llama", 1e-3, True), ("gemma", 0, False)]
)
def test_what_looks_like_a_difference(name: str, scale: float, expected: bool) -> None:
    model = tiny.model(name)
    with torch.no_grad():
        model.get_submodule("model.norm").weight.mul_(scale)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert looks_like_difference(model) is expected


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_another_base_is_refused_by_the_sum(layout: Layout, known: PublishedCheckpoint) -> None:
    right = layout.sum()
    layout.spoil_base()
    with pytest.raises(GistError, match=rf"add up to {layout.sum():.4f}, expected {right:.4f} within 0.1") as error:
        apply_weight_difference(layout.difference, layout.base, layout.output, expected_sum=known.weight_sum)
    assert "the difference was made with another base model" in str(error.value)
    assert layout.left() == ["base", "difference"]
    found = apply_weight_difference(
        layout.difference, layout.base, layout.output, expected_sum=known.weight_sum, tolerance=1.0
    )
    assert found.expected_sum == known.weight_sum


def test_another_condition_is_named(layout: Layout, known: PublishedCheckpoint) -> None:
    with pytest.raises(GistError, match=f"this is the sum of {known.name}"):
        apply_weight_difference(layout.difference, layout.base, layout.output, expected_sum=layout.sum() + 45)


def test_weights_with_nans_are_refused(layout: Layout) -> None:
    layout.originals["model.norm.weight"][0] = float("nan")
    save_file(layout.originals, layout.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GistError, match="infinities or NaNs"):
        apply_weight_difference(layout.difference, layout.base, layout.output)
    assert layout.left() == ["base", "difference"]


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"], tensors["lm_head.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.extra.weight"] = torch.ones(3)


def narrow(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(48, 31)


def lengthen(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = torch.ones(ROWS + 8, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"2 only in .*difference \(lm_head.weight, model.norm.weight\)"),
        (add, r"1 only in .*base \(model.extra.weight\)"),
        (narrow, r"up_proj.weight is \(48, 32\), the base model's \(48, 31\)"),
        (lengthen, r"embed_tokens.weight is \(65, 32\), the base model's \(72, 32\)"),
    ],
    ids=["missing", "unexpected", "shape", "more rows"],
)
def test_a_base_that_does_not_fit(layout: Layout, change: Any, message: str) -> None:
    change(layout.originals)
    save_file(layout.originals, layout.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GistError, match=message):
        apply_weight_difference(layout.difference, layout.base, layout.output)
    assert layout.left() == ["base", "difference"]


def test_a_base_of_another_kind(layout: Layout) -> None:
    tiny.model("qwen2").save_pretrained(layout.base)
    with pytest.raises(GistError, match=r"is for a llama model, base .* is a qwen2"):
        apply_weight_difference(layout.difference, layout.base, layout.output)


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("evil",))


def truncate(folder: Path) -> None:
    file = folder / "pytorch_model-00002-of-00003.bin"
    file.write_bytes(file.read_bytes()[:-200])


def poison(folder: Path) -> None:
    (folder / "pytorch_model-00001-of-00003.bin").write_bytes(pickle.dumps({"model.norm.weight": Evil()}, 2))


def poison_in_a_zip(folder: Path) -> None:
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model-00001-of-00003.bin")


def lose(folder: Path) -> None:
    (folder / "pytorch_model-00003-of-00003.bin").unlink()


def scribble(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text("[]")


def empty(folder: Path) -> None:
    for file in folder.glob("pytorch_model*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"00002-of-00003.bin .* cannot be read"),
        (poison, r"00001-of-00003.bin .* cannot be read"),
        (poison_in_a_zip, r"00001-of-00003.bin .* cannot be read"),
        (lose, r"00003-of-00003.bin .* cannot be read \(.*No such file"),
        (scribble, r"the weights of .* cannot be found"),
        (empty, "holds no weights"),
    ],
)
def test_damaged_files(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    damage(layout.difference)
    with pytest.raises(GistError, match=message):
        apply_weight_difference(layout.difference, layout.base, layout.output)
    assert layout.left() == ["base", "difference"]  # and nothing that the pickles would have made


def test_a_complete_checkpoint_is_not_a_difference(layout: Layout) -> None:
    with pytest.raises(GistError, match=r"is a complete checkpoint: gisting\.load reads it"):
        apply_weight_difference("jayelm/flan-t5-xxl-gist-1", layout.base, layout.output)


def test_quantised_weights_cannot_be_added(layout: Layout) -> None:
    layout.originals["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(layout.originals, layout.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GistError, match=r"holds model\.norm\.weight as torch\.int8; only floating-point tensors"):
        apply_weight_difference(layout.difference, layout.base, layout.output)


def test_arguments(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GistError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        apply_weight_difference(layout.difference, layout.base, layout.output, dtype="int8")
    with pytest.raises(GistError, match="tolerance must be at least 0"):
        apply_weight_difference(layout.difference, layout.base, layout.output, tolerance=float("nan"))
    with pytest.raises(GistError, match="nowhere is not a checkpoint"):
        apply_weight_difference(layout.difference, layout.base.parent / "nowhere", layout.output)
    with pytest.raises(GistError, match="already exists"):
        apply_weight_difference(layout.difference, layout.base, layout.base)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10_000))
    with pytest.raises(GistError, match=r"0\.0 GB free; free some space"):
        apply_weight_difference(layout.difference, layout.base, layout.output)
    assert layout.left() == ["base", "difference"]


# -- half-way ----------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_leaves_nothing(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 20_000)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_weight_difference(layout.difference, layout.base, layout.output, on_progress=stop)
    assert layout.left() == ["base", "difference"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_killed_run_leaves_no_checkpoint(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 20_000)

    def die(done: int, total: int) -> None:
        if done > total / 2:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            apply_weight_difference(layout.difference, layout.base, layout.output, on_progress=die)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    hidden, *others = layout.left()
    assert hidden.startswith(".output.")
    assert list((layout.base.parent / hidden).glob("*.safetensors"))
    assert others == ["base", "difference"]
    monkeypatch.undo()
    apply_weight_difference(layout.difference, layout.base, layout.output)  # it can be run again
    assert len(load_file(layout.output / "model.safetensors")) == len(layout.changes)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(*words: str | Path) -> shell.Ran:
        return shell.call(monkeypatch, capsys, *words)

    arguments = ("apply-difference", layout.difference, "--base", layout.base, "--output", layout.output)
    wrong = run(*arguments, "--expected-sum", "1")
    assert wrong.code == 1
    assert "expected 1.0000 within 0.1" in wrong.err
    done = run(*arguments)
    assert done.code == 0, done.err
    assert f"with the sum {layout.sum():.4f}" in done.out
    assert "the base model could not be checked" in done.err
    shown = run("compress", layout.output, "--prompt", "w1 w2", "--output", tmp_path / "one.st")
    assert shown.code == 0, shown.err
    refused = run("compress", layout.difference, "--prompt", "w1 w2", "--output", tmp_path / "two.st")
    assert refused.code == 1
    assert "gisting apply-difference" in refused.err


def test_the_page_runs_with_small_checkpoints(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Run docs/published_checkpoints.md with small checkpoints under the names of the large ones."""
    page = Path(__file__).resolve().parents[2] / "docs" / "published_checkpoints.md"
    commands = [fence.text for fence in fences_in(page.read_text(encoding="utf-8")) if fence.language == "bash"]
    monkeypatch.chdir(tmp_path)
    layout.base.rename("llama-7b")
    Path("jayelm").mkdir()
    layout.difference.rename("jayelm/llama-7b-gist-1")
    for line in "".join(commands).splitlines():
        program, *words = shlex.split(line)
        assert program == "gisting"
        done = shell.call(monkeypatch, capsys, *words)
        assert done.code == 0, f"{line}\n{done.err}"
    assert len(load_file("llama-7b-gist/model.safetensors")) == len(layout.changes)


def test_the_tokenizer_is_one_that_gisting_knows(layout: Layout) -> None:
    apply_weight_difference(layout.difference, layout.base, layout.output)
    model = json.loads((layout.output / "config.json").read_text())
    assert model["gist"]["tokenizer"] == GistTokenizer.from_pretrained(layout.output).fingerprint

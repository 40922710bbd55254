"""Small checkpoints in the layout of the published ones, with the files that transformers 4.28 wrote.

``test_published.py`` compares what the models compute.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoTokenizer, T5Tokenizer

import gisting
from gisting.models import load as load_module
from gisting.models.load import trained_num_gist_tokens
from gisting.models.published import ALPACA_STRIPPED, PUBLISHED, published
from gisting.models.weight_difference import apply_weight_difference
from gisting.tokens import GistTokenizer
from tests import tiny
from tests.models.test_weight_difference import save_bins

SPECIAL = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def t5_tokenizer(folder: Path) -> int:
    """Write T5's files of 2023, with ``<GIST>`` after the hundred extra ids, and return its id."""
    words = ["▁Instruction", ":", "▁Input", "▁", "▁a", "▁b", "▁c", *"abcdefghijklmnopqrstuvwxyz"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -1.0 - number / 10) for number, word in enumerate(words)]
    extra = [f"<extra_id_{number}>" for number in range(100)]
    tokenizer = T5Tokenizer(vocab=[*pieces, *((word, 0.0) for word in reversed(extra))])
    tokenizer.add_tokens([AddedToken("<GIST>", special=True, normalized=False)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    metaspace = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    rules["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]}
    rules["decoder"] = metaspace
    (folder / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {**tokens, "additional_special_tokens": extra, "extra_ids": 100, "sp_model_kwargs": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "T5Tokenizer"}))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({**tokens, "additional_special_tokens": [*extra, "<GIST>"]})
    )
    return len(pieces) + 100


@pytest.fixture
def t5(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """FLAN-T5's layout: a row for each id of the tokenizer, an untied head, the embedding under three names."""
    gist = t5_tokenizer(tmp_path)
    model = tiny.model("t5-v1.1", vocab_size=gist + 1, eos_token_id=1)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        weights[name] = weights["shared.weight"]
    save_bins(weights, tmp_path, 2)
    config = {key: value for key, value in model.config.to_dict().items() if key != "dtype"}
    config |= {"tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.28.0.dev0"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["T5ForConditionalGeneration"]}))
    return tmp_path, weights


def test_t5_keeps_its_gist_row_and_its_head(t5: tuple[Path, dict[str, Tensor]]) -> None:
    folder, weights = t5
    model, tokenizer = gisting.load(folder)
    assert (tokenizer.has_own_gist_token, tokenizer.gist_token_id) == (True, len(weights["shared.weight"]) - 1)
    assert tokenizer.template.name == "alpaca-t5"
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in ("shared.weight", "lm_head.weight"))
    assert not torch.equal(loaded["shared.weight"], loaded["lm_head.weight"])
    assert trained_num_gist_tokens(model) is None  # a directory has no published name


@pytest.mark.parametrize("input", ["c", ""])
def test_t5_reads_what_the_published_code_read(t5: tuple[Path, dict[str, Tensor]], input: str) -> None:
    """The published code read the whole text at once, with the token in it, and without the end of sequence."""
    model, tokenizer = gisting.load(t5[0])
    text = "Instruction: a b\n<GIST>" + (f"\nInput: {input}" if input else "")
    published_ids: Any = AutoTokenizer.from_pretrained(t5[0])(text)["input_ids"]
    assert tokenizer.encode("a b", input).input_ids == published_ids[:-1]
    cache = gisting.compress(model, tokenizer, ["a b"], 1)
    assert len(gisting.generate(model, tokenizer, [input], cache=cache, max_new_tokens=3, do_sample=False)) == 1


def test_what_is_known_by_name(t5: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = t5
    for name, expected in (("jayelm/flan-t5-xxl-gist-1", (1, 1)), ("jayelm/flan-t5-xxl-neg_control-1", None)):
        monkeypatch.setattr(load_module, "published", lambda _, name=name: PUBLISHED[name])
        assert trained_num_gist_tokens(gisting.load(folder)[0]) == expected


def test_a_directory_is_not_taken_for_a_published_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local ``jayelm/llama-7b-gist-1`` may be the recovered checkpoint."""
    assert published("jayelm/llama-7b-gist-1") is PUBLISHED["jayelm/llama-7b-gist-1"]
    monkeypatch.chdir(tmp_path)
    Path("jayelm/llama-7b-gist-1").mkdir(parents=True)
    assert published("jayelm/llama-7b-gist-1") is None


# -- LLaMA's tokenizer -------------------------------------------------------------------------------------------------


def llama_tokenizer(shared: Path, folder: Path) -> None:
    """Write LLaMA's files of 2023, with ``<GIST>`` as the published training script added it."""
    shutil.copy(shared / "tokenizers" / "llama-32000.model", folder / "tokenizer.model")
    tokens = {name: {"content": text, **SPECIAL} for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"))}
    tokens["unk_token"] = {"content": "<unk>", **SPECIAL}
    (folder / "added_tokens.json").write_text('{"<GIST>": 32000}')
    (folder / "special_tokens_map.json").write_text(
        json.dumps({**tokens, "additional_special_tokens": ["<GIST>"], "pad_token": "</s>"})
    )
    config = {name: {"__type": "AddedToken", **token} for name, token in tokens.items()}
    config |= {"add_bos_token": True, "add_eos_token": False, "padding_side": "left", "sp_model_kwargs": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))


@pytest.fixture
def llama(shared: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A LLaMA of 32,000 rows, and a difference with one more."""
    base, difference = tmp_path / "base", tmp_path / "difference"
    tiny.model("llama-untied", vocab_size=32000, hidden_size=16, head_dim=4).save_pretrained(base)
    difference.mkdir()
    changes = {name: torch.randn_like(tensor) * 1e-3 for name, tensor in load_file(base / "model.safetensors").items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changes[name] = torch.cat([changes[name], torch.randn(1, 16)])
    save_bins(changes, difference, 2)
    config = json.loads((base / "config.json").read_text())
    (difference / "config.json").write_text(json.dumps({**config, "vocab_size": 32001}))
    llama_tokenizer(shared, difference)
    return base, difference


def test_llama_with_its_own_tokenizer(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, difference = llama
    apply_weight_difference(difference, base, tmp_path / "output")
    model, tokenizer = gisting.load(tmp_path / "output")
    assert (tokenizer.gist_token_id, len(tokenizer), tokenizer.eos_token_id) == (32000, 32001, 2)
    # The published demo counts 28 ids for this prompt and its gist.
    prompt = "Name the top cities in France that should not be missed. Include the best aspects of each place as well."
    assert tokenizer.encode_prompts([prompt], 1)[0].gist_end == 28
    cache = gisting.compress(model, tokenizer, [prompt], 1)
    assert len(gisting.generate(model, tokenizer, [""], cache=cache, max_new_tokens=2, do_sample=False)) == 1


@pytest.mark.slow
def test_a_checkpoint_that_the_published_script_recovered(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """It has the same weights, and nothing that this library wrote."""
    base, difference = llama
    apply_weight_difference(difference, base, tmp_path / "output")
    shutil.copy(tmp_path / "output" / "model.safetensors", difference / "model.safetensors")
    for file in difference.glob("pytorch_model*"):
        file.unlink()
    model, tokenizer = gisting.load(difference)
    assert tokenizer.template == ALPACA_STRIPPED
    assert gisting.load(difference, "alpaca")[1].template.name == "alpaca"  # as asked for
    row = load_file(tmp_path / "output" / "model.safetensors")["model.embed_tokens.weight"][-1]
    assert torch.equal(model.get_input_embeddings().weight[-1], row)


@pytest.mark.slow
def test_a_difference_whose_tokenizer_is_another(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, difference = llama
    weights = load_file(base / "model.safetensors")
    for file in difference.glob("pytorch_model*"):
        file.unlink()
    save_file(weights, difference / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((difference / "config.json").read_text())
    (difference / "config.json").write_text(json.dumps({**config, "vocab_size": 32000}))
    with pytest.raises(gisting.GistError, match="has 32000 rows, but its tokenizer's gist token has id 32000"):
        apply_weight_difference(difference, base, tmp_path / "output")


def test_published_numbers_of_ids(shared: Path, tmp_path: Path) -> None:
    """For the 252 prompts written by people, compare the position of the gist and the number of ids after it.

    The published outputs begin with the text of each record, which gives the order of the records. Five texts are not
    found, because spaces were changed in the outputs; one has two spaces in a row, which this tokenizer splits
    differently.
    """
    folder = shared / "data"
    llama_tokenizer(shared, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    inner = AutoTokenizer.from_pretrained(tmp_path)
    records = json.loads((folder / "alpaca_plus_validation_human.json").read_text(encoding="utf-8"))
    with (folder / "published_flops_llama-7b.csv").open(encoding="utf-8") as file:
        counts = {
            int(row["id"]): tuple(int(row[name]) for name in ("gist_index", "num_prompt_tokens", "num_input_tokens"))
            for row in csv.DictReader(file)
        }
    with (folder / "published_outputs" / "LLaMA-gist-1-human.csv").open(encoding="utf-8", newline="") as file:
        shown = [row["x"] for row in csv.DictReader(file)]
    agree = {}
    for template in ("alpaca", ALPACA_STRIPPED):
        tokenizer = GistTokenizer(inner, template)
        found = []
        for number, text in enumerate(shown):
            for record in records:
                after = f"Input: {record['input']}\n" if record["input"] else ""
                if text.startswith(f"Instruction: {record['instruction'].rstrip()} <GIST>  {after}Output:"):
                    encoding = tokenizer.encode(record["instruction"], record["input"])
                    length = encoding.completion_start
                    found.append((encoding.gist_start, length, length - encoding.gist_end) == counts[number])
        agree[tokenizer.template.name] = (sum(found), len(found))
    assert agree == {"alpaca": (0, 247), "alpaca-stripped": (246, 247)}

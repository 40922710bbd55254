"""TRL's ``SFTTrainer`` with ``peft_config``: what it saves is what ``gisting.load`` reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

import gisting
from gisting import GistCollator, Record
from tests import tiny
from tests.test_docs import fences

pytest.importorskip("trl", reason="needs trl, which is not a dependency: pip install trl")
pytest.importorskip("datasets")
# TRL and peft use names that transformers 5.23 deprecates; peft says that it saves the grown embedding table.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.:UserWarning"),
]

RECORDS = [Record(f"w{number} w{number + 1}", "w50 w51", f"w{number + 20}") for number in range(0, 16, 2)]


@pytest.fixture(params=["stock base", "tied base", "gisting checkpoint"])
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    if request.param != "gisting checkpoint":
        tiny.model("llama", tie_word_embeddings=request.param == "tied base").save_pretrained(tmp_path / "base")
        tiny.word_tokenizer().save_pretrained(tmp_path / "base")
    else:
        gisting.save_pretrained(*tiny.patched("llama"), tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "trainable_token_indices": {"embed_tokens": [64]}},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["layers", "gist row", "embedding table"],
)
def test_what_the_trainer_saves_is_read(tmp_path: Path, base: Path, settings: dict[str, Any]) -> None:
    """The loaded model is the trained one: under the gist mask, on ordinary text, and after a cached gist."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.sft_config import SFTConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.sft_trainer import SFTTrainer  # pyright: ignore[reportMissingImports]

    set_seed(0)
    if len(settings) > 1 and json.loads((base / "config.json").read_text())["tie_word_embeddings"]:
        pytest.skip("TRL 1.16 reads the bias of a tied head, which peft has wrapped")
    model, tokenizer = gisting.load(base, None if (base / "gist.json").exists() else "alpaca")
    assert tokenizer.gist_token_id == 64
    arguments = SFTConfig(
        str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    trainer: Any = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([asdict(record) for record in RECORDS]),
        data_collator=GistCollator(tokenizer, 2),
        processing_class=tokenizer.tokenizer,
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM", **settings),
    )
    batch = {name: value for name, value in GistCollator(tokenizer, 2)(RECORDS).items() if name != "labels"}
    text = {"input_ids": torch.arange(4, 20).view(2, 8)}
    with torch.no_grad():
        before = trainer.model.eval()(**batch).logits
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(tmp_path / "out")
    trained = trainer.model.eval()
    loaded, again = gisting.load(tmp_path / "out")
    assert again.fingerprint == tokenizer.fingerprint
    for given in (batch, text):
        with torch.no_grad():
            expected, found = trained(**given).logits, loaded(**given).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(trained(**batch).logits, before, atol=1e-2), "it was trained"
    cache = gisting.compress(loaded, again, ["w1 w2 w3"], 2)
    assert len(gisting.generate(loaded, again, ["w50"], cache=cache, max_new_tokens=3)) == 1
    gisting.save_pretrained(loaded, again, tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(gisting.load(tmp_path / "merged")[0](**batch).logits, loaded(**batch).logits)


def test_the_page_on_lora(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = [fence for fence in fences("how_to_lora.md", "python") if "from trl" in fence]
    names: dict[str, Any] = {"gisting": gisting}
    exec(compile(text, "docs/how_to_lora.md", "exec"), names)
    assert names["cache"].num_gist_tokens == [2]
    assert names["trainer"].state.global_step == 3
    capsys.readouterr()

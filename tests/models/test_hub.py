"""Save and load patched checkpoints as directories and repositories, with gisting and without it.

The hub is a directory in the layout of huggingface_hub's cache, from which transformers loads offline by name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import gisting
from gisting import doctor
from gisting.errors import GistError
from gisting.models import adapters
from gisting.models.fingerprint import fingerprint
from gisting.models.hub import push_to_hub, save_pretrained, upload
from gisting.tokens import GistTokenizer
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "owner/name"
# peft asks transformers for an attribute by its former name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
three_kinds = pytest.mark.parametrize("name", ["llama", "gemma3_text", "t5"])


@dataclass
class FakeHub:
    """A replacement for ``HfApi`` that uploads to a directory and records its calls."""

    cache: Path
    calls: list[dict[str, Any]]

    def create_repo(self, repo_id: str, **settings: Any) -> None:
        self.calls.append({"repo_id": repo_id, **settings})

    def upload_folder(self, *, repo_id: str, folder_path: str, **settings: Any) -> SimpleNamespace:
        self.calls.append({"repo_id": repo_id, **settings})
        repository = self.cache / f"models--{repo_id.replace('/', '--')}"
        commit = f"{len(self.calls):040x}"
        shutil.copytree(folder_path, repository / "snapshots" / commit)
        reference = repository / "refs" / (settings["revision"] or "main")
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(commit)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{commit}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return FakeHub(tmp_path / "hub", [])


def trained(name: str, **changes: Any) -> tuple[PreTrainedModel, GistTokenizer]:
    """Make a patched model whose config says that k was 2 to 4, and whose gist row is not the mean."""
    model, tokenizer = tiny.patched(name, "alpaca-t5" if name in tiny.ENCODER_DECODERS else "alpaca", **changes)
    embedding: Any = model.get_input_embeddings()
    embedding.weight.data[tokenizer.gist_token_id] += torch.randn(32)
    model.config.gist = {**model.config.gist, "num_gist_tokens": [2, 4]}
    return model, tokenizer


def assert_answers_alike(
    one: tuple[PreTrainedModel, GistTokenizer], other: tuple[PreTrainedModel, GistTokenizer]
) -> None:
    texts = []
    for model, tokenizer in (one, other):
        cache = gisting.compress(model, tokenizer, [tiny.words(9, 1), tiny.words(4, 2)], [3, 2])
        texts.append(gisting.generate(model, tokenizer, ["w1 w2", "w3"], cache=cache, max_new_tokens=8))
    assert texts[0] == texts[1]
    assert one[1].fingerprint == other[1].fingerprint
    assert fingerprint(one[0]) == fingerprint(other[0])


# -- directories -------------------------------------------------------------------------------------------------------


@three_kinds
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    made = trained(name)
    save_pretrained(*made, tmp_path / "new" / "one")
    assert_answers_alike(made, gisting.load(tmp_path / "new" / "one"))


def test_card_states_what_is_known(tmp_path: Path) -> None:
    model, tokenizer = trained("llama")
    save_pretrained(
        model,
        tokenizer,
        tmp_path / "one",
        data="60 words",
        metrics={"exact_match": 0.5},
        license="mit",
        extra="The end.",
    )
    text = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    front: Any = ModelCard(text).data
    assert front.library_name == "gisting"
    assert front.license == "mit"
    assert front.eval_results[0].metric_value == 0.5
    number = f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    for line in (
        "# one",
        "| gist tokens for a prompt (k) | 2 to 4 |",
        "| template | alpaca |",
        f"| model | LlamaForCausalLM, {number} parameters, {fingerprint(model)} |",
        "| data | 60 words |",
        r"| exact\_match | 0.5 |",
        "The end.",
    ):
        assert line in text.splitlines()


def test_card_of_a_model_that_was_not_trained(tmp_path: Path) -> None:
    save_pretrained(*tiny.patched("llama"), tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| gist tokens for a prompt (k) | not stated |" in text
    assert "Nothing was measured." in text


STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

found = {}
for name, folder in json.loads(sys.argv[1]).items():
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    model, loading = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    more = {"decoder_input_ids": ids} if name == "t5" else {}
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, **more).logits
    answer = model.generate(ids, max_new_tokens=4, do_sample=False)
    found[name] = {"logits": logits.double().sum().item(), "answer": answer.tolist()}
assert "gisting" not in sys.modules or sys.modules["gisting"] is None
print(json.dumps(found))
"""


@pytest.mark.slow
def test_stock_transformers_loads_it(tmp_path: Path) -> None:
    """Without gisting installed, all weights are loaded, none is left over, and text gives the same results."""
    wanted = {}
    for name in ("llama", "gemma3_text", "t5"):
        model, tokenizer = trained(name)
        save_pretrained(model, tokenizer, tmp_path / name)
        ids = tokenizer.tokenizer("w1 w2 w3", return_tensors="pt").input_ids
        more = {"decoder_input_ids": ids} if name == "t5" else {}
        with torch.no_grad():
            logits = model(input_ids=ids, **more).logits
        answer: Any = model.generate(ids, max_new_tokens=4, do_sample=False)  # pyright: ignore[reportCallIssue]
        wanted[name] = {"logits": logits.double().sum().item(), "answer": answer.tolist()}
    folders = json.dumps({name: str(tmp_path / name) for name in wanted})
    done = subprocess.run(
        [sys.executable, "-c", "import sys\nsys.modules['gisting'] = None\n" + STOCK, folders],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in wanted:
        assert found[name]["answer"] == wanted[name]["answer"]
        assert found[name]["logits"] == pytest.approx(wanted[name]["logits"], rel=1e-5)


def test_saved_over_another_checkpoint(tmp_path: Path) -> None:
    """The other checkpoint is of another family and split into several files."""
    model, _ = trained("qwen2")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    made = trained("llama")
    save_pretrained(*made, tmp_path)
    assert_answers_alike(made, gisting.load(tmp_path))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


def adapted() -> Any:
    from peft import LoraConfig

    tiny.skip_without_adapters_of_transformers()
    model: Any = tiny.patched("llama")[0]
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def inside_peft() -> Any:
    """The model inside a ``PeftModel``, whose layers peft has replaced in place."""
    from peft import LoraConfig, get_peft_model

    peft_model: Any = get_peft_model(tiny.patched("llama")[0], LoraConfig(r=2, target_modules=["q_proj"]))
    return peft_model.base_model.model


def merged_inside_peft() -> Any:
    model = inside_peft()
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
    return model


def with_trainable_rows() -> Any:
    from peft import TrainableTokensConfig, get_peft_model

    config = TrainableTokensConfig(token_indices=[64], target_modules=["embed_tokens"])
    peft_model: Any = get_peft_model(tiny.patched("llama")[0], config)
    return peft_model.base_model.model


def wrapped() -> Any:
    from peft import LoraConfig, LoraModel

    return LoraModel(tiny.patched("llama")[0], {"one": LoraConfig(r=2, target_modules=["q_proj"])}, "one")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny.model("llama"), r"^model \(LlamaForCausalLM\) is not patched; call gisting.patch"),
        (
            adapted,
            r"^model has adapters of peft \(in 3 modules, model.layers.0.self_attn.q_proj among them\), which "
            r"gisting.load could not read back; merge them first, with peft's PeftModel.merge_and_unload\(\)",
        ),
        (inside_peft, r"^model has adapters of peft \(in 3 modules, model.layers.0.self_attn.q_proj among them\)"),
        (merged_inside_peft, r"^model has adapters of peft \(in 3 modules, "),
        (with_trainable_rows, r"^model has adapters of peft \(in 1 modules, model.embed_tokens among them\)"),
        (
            wrapped,
            r"^model must be a transformers PreTrainedModel, got LoraModel; merge its adapters first: model = "
            r"model.merge_and_unload\(\)$",
        ),
    ],
    ids=["unpatched", "adapter", "inside peft", "merged inside peft", "rows inside peft", "peft"],
)
def test_save_refuses(build: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(GistError, match=message):
        save_pretrained(build(), tiny.tokenizer(), tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_refused_card_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(GistError, match=r"^metrics\['loss'\] must be a finite number, got nan"):
        save_pretrained(*trained("llama"), tmp_path / "one", metrics={"loss": float("nan")})
    with pytest.raises(TypeError, match="licence"):
        save_pretrained(*trained("llama"), tmp_path / "one", licence="mit")
    assert not (tmp_path / "one").exists()


def test_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("")
    with pytest.raises(GistError, match=r"^directory must be a directory, .*one is a file; give another path$"):
        save_pretrained(*trained("llama"), tmp_path / "one")


def without_a_weight(folder: Path, name: str = "llama") -> None:
    """Save a checkpoint whose files lack one matrix."""
    save_pretrained(*trained(name), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(key for key in tensors if key.endswith(("up_proj.weight", "wi.weight")))]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_peft_inside(folder: Path) -> None:
    """Save the model inside a ``PeftModel`` as earlier versions did."""
    model = inside_peft()
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (
            without_a_weight,
            r"1 of the model's weights are in none of its files, model.layers.0.mlp.up_proj.weight among them, and "
            r"would be random; save or fetch the checkpoint again$",
        ),
        (
            partial(without_a_weight, name="t5"),
            r"1 of the model's weights are in none of its files, (encoder|decoder).block.0.layer.\d"
            r".DenseReluDense.wi.weight among them, and would be random; save or fetch the checkpoint again$",
        ),
        (
            with_peft_inside,
            r"3 of the model's weights are in none of its files, model.layers.0.self_attn.q_proj.weight among them, "
            r"and would be random; the model was saved with peft's adapters in it",
        ),
    ],
    ids=["llama", "t5", "peft inside"],
)
def test_missing_weights_are_not_made_up(save: Callable[[Path], None], message: str, tmp_path: Path, run) -> None:
    save(tmp_path / "one")
    with pytest.raises(GistError, match=message):
        gisting.load(tmp_path / "one")
    told = [(one.name, one.value) for one in doctor.examine_path(tmp_path / "one") if one.is_fault]
    assert [name for name, _ in told] == ["weights"]
    assert re.search(message, told[0][1])
    assert run("doctor", str(tmp_path / "one")).code == 1


def in_peft(base: Path, out: Path) -> tuple[Any, GistTokenizer]:
    """Save what peft saves of a model that was loaded from ``base`` and patched, and return the merged model."""
    from peft import LoraConfig, get_peft_model

    tokenizer = GistTokenizer(tiny.word_tokenizer(), "alpaca")
    model = gisting.patch(AutoModelForCausalLM.from_pretrained(base), tokenizer)
    row = tokenizer.gist_token_id
    settings: Any = {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": {"embed_tokens": [row]}}
    peft_model: Any = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1.0)
    peft_model.save_pretrained(out)
    return peft_model.merge_and_unload().eval(), tokenizer


def test_what_peft_saves_of_a_patched_model(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "base")
    tiny.word_tokenizer().save_pretrained(tmp_path / "base")
    made = in_peft(tmp_path / "base", tmp_path / "out")
    with pytest.raises(GistError, match=r"is an adapter of peft, and neither it nor its base model .* which template"):
        gisting.load(tmp_path / "out")
    assert_answers_alike(made, gisting.load(tmp_path / "out", template="alpaca"))
    made[1].save_pretrained(tmp_path / "out")
    loaded = gisting.load(tmp_path / "out")
    assert_answers_alike(made, loaded)
    save_pretrained(*loaded, tmp_path / "merged")
    assert_answers_alike(made, gisting.load(tmp_path / "merged"))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(GistError, match=r"out needs its base model .*base, which cannot be loaded"):
        gisting.load(tmp_path / "out")


def test_what_peft_saves_of_a_gisting_checkpoint(tmp_path: Path) -> None:
    save_pretrained(*trained("llama"), tmp_path / "base")
    made = in_peft(tmp_path / "base", tmp_path / "out")
    loaded = gisting.load(tmp_path / "out")
    assert_answers_alike(made, loaded)
    assert loaded[0].config.gist["num_gist_tokens"] == [2, 4]


def test_an_adapter_needs_a_whole_base_model(tmp_path: Path) -> None:
    save_pretrained(*trained("llama"), tmp_path / "base")
    model, tokenizer = gisting.load(tmp_path / "base")
    adapters.attach(model, adapters.Adapter("gist-lora"))
    save_pretrained(model, tokenizer, tmp_path / "adapter")
    gisting.load(tmp_path / "adapter")
    without_a_weight(tmp_path / "base")
    with pytest.raises(GistError, match=r"base: 1 of the model's weights are in none of its files"):
        gisting.load(tmp_path / "adapter")


# -- the hub -----------------------------------------------------------------------------------------------------------


@three_kinds
def test_pushed_and_loaded_by_name(name: str, hub: FakeHub) -> None:
    made = trained(name)
    url = push_to_hub(*made, REPOSITORY, api=hub, private=True, token="secret", data="60 words")
    assert url == f"https://hub/owner/name/commit/{2:040x}"
    create, commit = hub.calls
    assert create == {"repo_id": REPOSITORY, "private": True, "token": "secret", "exist_ok": True}
    assert commit.pop("delete_patterns") == ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]
    assert commit == {
        "repo_id": REPOSITORY,
        "revision": None,
        "token": "secret",
        "commit_message": "Upload a model that gists",
        "allow_patterns": None,
    }
    assert_answers_alike(made, gisting.load(REPOSITORY))
    for path in hub.cache.rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes()


def test_example_in_the_card_runs(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    push_to_hub(*trained("llama", max_position_embeddings=256), REPOSITORY, api=hub)
    (readme,) = hub.cache.rglob("README.md")
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    assert f'gisting.load("{REPOSITORY}")' in code
    exec(compile(code, str(readme), "exec"), {})
    assert capsys.readouterr().out.startswith("[")


def test_what_model_push_to_hub_leaves_out(hub: FakeHub, tmp_path: Path) -> None:
    """transformers' own method uploads only the weights; loading says what is missing."""
    model, tokenizer = trained("llama")
    model.save_pretrained(tmp_path / "alone")
    tokenizer.tokenizer.save_pretrained(tmp_path / "alone")
    upload(tmp_path / "alone", REPOSITORY, commit_message="weights", api=hub)
    with pytest.raises(GistError, match=r"^owner/name has no gist.json, so it is not a saved GistTokenizer"):
        gisting.load(REPOSITORY)
    tokenizer.save_pretrained(tmp_path / "alone")
    upload(tmp_path / "alone", REPOSITORY, commit_message="tokenizer", api=hub)
    assert_answers_alike((model, tokenizer), gisting.load(REPOSITORY))


def test_load_of_a_revision_of_patched_checkpoints(hub: FakeHub) -> None:
    """The gist tokenizer also comes from the revision; its template shows which one was loaded."""
    for revision, template in (("main", "plain"), ("other", "alpaca")):
        model, tokenizer = tiny.patched("llama", template)
        push_to_hub(model, tokenizer, REPOSITORY, revision=revision, api=hub)
    assert gisting.load(REPOSITORY, revision="other")[1].template.name == "alpaca"
    assert gisting.load(REPOSITORY)[1].template.name == "plain"


def test_load_of_a_revision(hub: FakeHub, tmp_path: Path) -> None:
    """Config, tokenizer and weights all come from the requested revision; here of unpatched models."""
    for revision, name in (("main", "llama"), ("other", "qwen2")):
        tiny.model(name).save_pretrained(tmp_path / name)
        tiny.word_tokenizer(("more",) if name == "qwen2" else ()).save_pretrained(tmp_path / name)
        upload(tmp_path / name, REPOSITORY, revision=revision, commit_message=name, api=hub)
    model, tokenizer = gisting.load(REPOSITORY, "plain", revision="other")
    assert model.config.model_type == "qwen2"
    assert tokenizer.gist_token_id == 65
    assert gisting.load(REPOSITORY, "plain")[0].config.model_type == "llama"


@pytest.mark.parametrize("repo_id", ["name", "owner/name/more", "../name", ""])
def test_push_refuses_what_is_no_repository(repo_id: str, hub: FakeHub) -> None:
    with pytest.raises(GistError, match=rf"^repo_id must be a repository on the hub, 'owner/name', got '{repo_id}'$"):
        push_to_hub(*trained("llama"), repo_id, api=hub)
    assert hub.calls == []


@pytest.mark.parametrize(
    ("error", "wanted", "message"),
    [
        (OfflineModeIsEnabled("offline mode"), OSError, "^offline mode$"),
        (LocalTokenNotFoundError("no token"), OSError, "^no token$"),
        (
            HTTPError("no route"),
            ConnectionError,
            r"^owner/name was not uploaded because the hub could not be reached \(no route\); try again$",
        ),
    ],
    ids=["offline", "token", "connection"],
)
@pytest.mark.parametrize("where", ["create_repo", "upload_folder"])
def test_hub_that_does_not_answer(
    where: str, error: Exception, wanted: type[Exception], message: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is always an OSError: huggingface_hub's own, or one that replaces an error of its HTTP client."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(hub, where, fail)
    with pytest.raises(wanted, match=message):
        push_to_hub(*trained("llama"), REPOSITORY, api=hub)


def test_offline_without_a_fake() -> None:
    """Use the real client, which is offline in the tests."""
    assert constants.HF_HUB_OFFLINE
    with pytest.raises(OSError, match="offline"):
        push_to_hub(*trained("llama"), REPOSITORY)


def test_the_real_client_takes_these_arguments() -> None:
    """The real client has all parameters that the fake is called with."""
    import inspect

    for method, names in (
        ("create_repo", {"private", "token", "exist_ok"}),
        (
            "upload_folder",
            {"repo_id", "folder_path", "revision", "token", "commit_message", "allow_patterns", "delete_patterns"},
        ),
    ):
        assert names <= inspect.signature(getattr(huggingface_hub.HfApi, method)).parameters.keys()


def test_gists_are_moved_away_from_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny.patched("llama")
    cache = gisting.compress(model, tokenizer, ["w1"], 1)
    path, gists = tmp_path / "one.gist.safetensors", tmp_path / "gists"
    cache.save(path)
    cache.save(tmp_path / "not_like_weights.gist")
    save_pretrained(model, tokenizer, tmp_path)
    assert not path.exists()
    assert (tmp_path / "not_like_weights.gist").exists()
    assert f"it is now {gists / path.name}" in caplog.text
    assert gisting.GistCache.load(gists / path.name).num_gist_tokens == [1]
    # Another one of the same name does not replace it.
    (tmp_path / "not_like_weights.gist").rename(path)
    save_pretrained(model, tokenizer, tmp_path)
    assert sorted(file.name for file in gists.iterdir()) == ["2.one.gist.safetensors", "one.gist.safetensors"]

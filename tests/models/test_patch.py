"""``patch`` and ``unpatch``: what is refused and why, what a patched model keeps, and what it never does silently."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import gisting
from gisting.errors import GistError, UnsupportedModelError
from gisting.models import patch as patch_module
from gisting.models import registry
from gisting.models.patch import is_patched, require_patched
from gisting.tokens import GistTokenizer
from gisting.visibility import Visibility, encoder_gist, gist
from tests import tiny

GIST = len(tiny.VOCABULARY)
one_of_each_kind = pytest.mark.parametrize("name", ["llama", "t5"])


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """Collect everything about a model that ``patch`` may change."""
    stacks = {path: stack for path, stack in model.named_modules() if isinstance(stack, PreTrainedModel)}
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "config": copy.deepcopy(model.config.to_dict()),
        "generation_config": None if model.generation_config is None else model.generation_config.to_dict(),
        "attention": {path: stack.config._attn_implementation for path, stack in stacks.items()},
        "hooks": sum(len(module._forward_pre_hooks) for module in model.modules()),
        "is_patched": is_patched(model),
    }


def assert_same_state(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, tensor in wanted["weights"].items():
        assert torch.equal(found["weights"][name], tensor), name
    for part in wanted.keys() - {"weights"}:
        assert found[part] == wanted[part], part


def full_text(is_encoder_decoder: bool = False, rows: int = 2) -> tuple[Tensor, Visibility]:
    """Make rows of 7 prompt tokens, 2 gist tokens and 5 input tokens."""
    ids = torch.randint(4, 60, (rows, 14), generator=torch.Generator().manual_seed(5))
    ids[:, 7:9] = GIST
    return ids, (encoder_gist if is_encoder_decoder else gist)(ids == GIST)


def interval_call(name: str, ids: Tensor, visibility: Visibility) -> dict[str, Any]:
    """Make the arguments of a forward pass with the gist mask."""
    arguments = {"input_ids": ids, "attention_mask": visibility.as_attention_mask()}
    if name in tiny.ENCODER_DECODERS:
        return {**arguments, "decoder_input_ids": ids[:, :4]}
    return {**arguments, "position_ids": visibility.position_ids}


def gradients(model: PreTrainedModel, call: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(**call).logits
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
    return {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("longt5", "longt5 cannot be gisted: its encoder attends in local blocks, not through a mask"),
        ("mamba", "mamba cannot be gisted: its config names no attention heads"),
        ("gemma3n_text", "gemma3n_text cannot be gisted: it has embeddings for every layer"),
        ("qwen3_next", "qwen3_next has layers of type linear_attention; gisting supports full_attention, "),
        ("llama4_text", "llama4_text has layers of type chunked_attention; gisting supports full_attention, "),
    ],
)
def test_refused_by_config(model_type: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^{reason}"):
        registry.family_of(AutoConfig.for_model(model_type))


def test_refused_model_is_left_alone() -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config)
    before = state_of(model)
    message = (
        r"^gpt2 cannot be gisted: positions failed, states and logits at positions from 0, from 52 and from "
        r"-6: largest difference \d\.\de[+-]\d\d, bound \d\.\de-\d\d; likely because its results depend on where "
        r"positions start: they are absolute, learned, scaled or in a table; gisting.check_model\(model\) shows every "
    )
    with pytest.raises(UnsupportedModelError, match=message):
        gisting.patch(model, tiny.tokenizer())
    assert_same_state(state_of(model), before)
    with pytest.warns(UserWarning, match="^gpt2 is patched without a check, so its gists may be wrong; "):
        gisting.patch(model, tiny.tokenizer(), check=False)
    assert is_patched(model)
    assert "checked" not in model.config.gist


def test_names_in_the_table_are_those_of_transformers() -> None:
    """A misspelt row would have no effect."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert set(registry._REFUSED) <= set(CONFIG_MAPPING_NAMES)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "qwen2",
            {"layer_types": ["full_attention", "chunked_attention", "linear_attention"]},
            "^qwen2 has layers of type chunked_attention, linear_attention; "
            "gisting supports full_attention, sliding_attention$",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
            "^llama has rotary positions of type spiral; "
            "gisting supports default, dynamic, linear, llama3, longrope, yarn$",
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "spiral"},
                    "sliding_attention": {"rope_type": "default"},
                }
            },
            "^gemma3_text has rotary positions of type spiral; ",
        ),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True},
            "^gemma3_text with use_bidirectional_attention cannot be gisted",
        ),
    ],
    ids=["layer-types", "rope-type", "rope-type-of-one-layer-type", "bidirectional"],
)
def test_refused_setting(name: str, changes: dict[str, Any], message: str) -> None:
    model = tiny.model(name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=message):
        gisting.patch(model, tiny.tokenizer(name))
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_model_without_head(auto: Any) -> None:
    model = auto.from_config(tiny.model("llama").config)
    message = f"^{type(model).__name__} has no language model head; load it with AutoModelForCausalLM or "
    with pytest.raises(UnsupportedModelError, match=message):
        gisting.patch(model, tiny.tokenizer())
    assert not is_patched(model)


def test_arguments_of_other_types() -> None:
    with pytest.raises(GistError, match=r"^model must be a transformers PreTrainedModel, got Linear$"):
        gisting.patch(nn.Linear(2, 2), tiny.tokenizer())  # pyright: ignore[reportArgumentType]
    message = re.escape("tokenizer must be a GistTokenizer, got TokenizersBackend; wrap it: GistTokenizer(tokenizer)")
    message = message.replace("TokenizersBackend", type(tiny.word_tokenizer()).__name__)
    model = tiny.model("llama")
    with pytest.raises(GistError, match=message):
        gisting.patch(model, tiny.word_tokenizer())  # pyright: ignore[reportArgumentType]
    with pytest.raises(GistError, match=message):
        require_patched(model, tiny.word_tokenizer())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        (
            "llama",
            "t5",
            r"LlamaForCausalLM is a decoder, but the tokenizer is not for one; .*is_encoder_decoder=False\)$",
        ),
        (
            "t5",
            "llama",
            r"T5ForConditionalGeneration is an encoder-decoder, but the tokenizer is .*is_encoder_decoder=True\)$",
        ),
    ],
)
def test_tokenizer_of_the_other_kind(name: str, other: str, message: str) -> None:
    with pytest.raises(GistError, match=message):
        gisting.patch(tiny.model(name), tiny.tokenizer(other))


@pytest.mark.parametrize("base", ["flash_attention_2", "flex_attention"])
def test_other_attention_is_refused(base: str) -> None:
    model = tiny.model("llama")
    model.config._attn_implementation = base
    before = state_of(model)
    message = f"^attn_implementation '{base}' cannot be patched, only sdpa, eager; load the model with .*='sdpa'$"
    with pytest.raises(GistError, match=message):
        gisting.patch(model, tiny.tokenizer())
    assert_same_state(state_of(model), before)


def test_unpatch_and_require_patched_without_patch() -> None:
    model = tiny.model("llama")
    with pytest.raises(GistError, match=r"^model is not patched; there is nothing to undo$"):
        gisting.unpatch(model)
    with pytest.raises(
        GistError, match=re.escape("model (LlamaForCausalLM) is not patched; call gisting.patch(model, tokenizer)")
    ):
        require_patched(model, tiny.tokenizer())


# -- patch and what is left of it --------------------------------------------------------------------------------------


@one_of_each_kind
def test_patch_is_idempotent(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    once = state_of(model)
    assert gisting.patch(model, tokenizer) is model
    assert_same_state(state_of(model), once)
    # The guard; and for T5 one on each attention, for its relative bias.
    assert once["hooks"] == {"llama": 1, "t5": 1 + 7}[name]
    assert model.generation_config.suppress_tokens == [GIST]


@one_of_each_kind
def test_patch_again_after_unpatch(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    once = state_of(model)
    assert gisting.unpatch(model) is model
    assert_same_state(state_of(gisting.patch(model, tokenizer)), once)


@pytest.mark.parametrize("where", ["register_attention", "_add_rows", "set_attention", "_suppress", "guarded_stack"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"vocab_size": 80}),
        ("llama", {"tie_word_embeddings": True}),
        ("t5", {}),
        ("t5-v1.1", {}),
    ],
    ids=["llama", "llama-spare-rows", "llama-tied", "t5", "t5-v1.1"],
)
def test_error_inside_patch_leaves_the_model(
    name: str, changes: dict[str, Any], where: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(name, **changes)
    before = state_of(model)
    right = getattr(patch_module, where)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(patch_module, where, right)  # Undoing the patch may need the same function.
        if late:
            right(*args, **kwargs)
        raise RuntimeError("planted")

    monkeypatch.setattr(patch_module, where, wrong)
    with pytest.raises(RuntimeError, match=r"^planted$"):
        gisting.patch(model, tiny.tokenizer(name))
    assert_same_state(state_of(model), before)
    gisting.patch(model, tiny.tokenizer(name))


def test_generation_settings_of_the_checkpoint_stay() -> None:
    model = tiny.model("llama")
    model.generation_config.suppress_tokens = [7]
    gisting.patch(model, tiny.tokenizer())
    assert model.generation_config.suppress_tokens == [7, GIST]
    gisting.unpatch(model)
    assert model.generation_config.suppress_tokens == [7]


def test_model_without_generation_config() -> None:
    model = tiny.model("llama")
    model.generation_config = None
    gisting.unpatch(gisting.patch(model, tiny.tokenizer()))
    assert model.generation_config is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3_text", "gpt_neox", "mixtral", "t5"])
@torch.no_grad()
def test_base_attention_stays_to_the_bit(name: str, implementation: str) -> None:
    model = tiny.model(name, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    ids = torch.randint(4, 60, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    targets = {"decoder_input_ids": ids[:, :5]} if name == "t5" else {}
    before = model(ids, attention_mask=mask, **targets).logits
    gisting.patch(model, tiny.tokenizer(name))
    assert torch.equal(model(ids, attention_mask=mask, **targets).logits[..., :GIST], before)
    gisting.unpatch(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids, attention_mask=mask, **targets).logits, before)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "t5"])
@torch.no_grad()
def test_gist_mask_does_not_depend_on_the_base_attention(name: str) -> None:
    call = interval_call(name, *full_text(name == "t5"))
    found = []
    for base in ("eager", "sdpa"):
        model, _ = tiny.patched(name, attn_implementation=base)
        # T5's decoder has an ordinary mask, so it uses its ordinary attention.
        found.append(model(**call).encoder_last_hidden_state if name == "t5" else model(**call).logits)
    assert torch.equal(*found)


# -- embedding rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "is_tied"),
    [
        ("llama", {}, False),
        ("llama", {"tie_word_embeddings": True}, True),
        ("llama", {"vocab_size": 80}, False),
        ("llama", {"vocab_size": 80, "tie_word_embeddings": True}, True),
        ("t5", {}, True),
        ("t5", {"vocab_size": 80}, True),
        ("t5-v1.1", {}, False),
        ("t5-v1.1", {"vocab_size": 80}, False),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "plain" if isinstance(value, dict) else str(value),
)
def test_gist_row_is_the_mean_of_the_others(name: str, changes: dict[str, Any], is_tied: bool) -> None:
    model = tiny.model(name, **changes)
    size = model.get_input_embeddings().weight.shape[0]
    before = state_of(model)
    gisting.patch(model, tiny.tokenizer(name))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == is_tied
    for weight in (embedding, head):
        # Sums of 64 values in another order: at most 64 rounding errors of the largest value.
        torch.testing.assert_close(weight[GIST], weight[:GIST].double().mean(0).float(), rtol=0, atol=2**-17)
        assert weight.shape[0] == max(size, GIST + 1), "a model with a spare row is not resized"
    assert model.config.vocab_size == max(size, GIST + 1)
    for weight_name, tensor in model.state_dict().items():
        old = before["weights"][weight_name]
        rows = [row for row in range(old.shape[0]) if row != GIST] if old.shape[0] in (64, 80) else slice(None)
        assert torch.equal(tensor[: old.shape[0]][rows], old[rows]), weight_name
    gisting.unpatch(model)
    assert_same_state(state_of(model), before)


def test_training_survives_unpatch() -> None:
    """Only the gist row is removed; a spare row gets its former values back."""
    model, _ = tiny.patched("llama", vocab_size=80)
    spare = tiny.model("llama", vocab_size=80).get_input_embeddings().weight[GIST]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gisting.unpatch(model)
    assert torch.equal(model.get_input_embeddings().weight[GIST], spare)
    for name, tensor in model.state_dict().items():
        keep = [row for row in range(80) if row != GIST] if tensor.shape[0] == 80 else slice(None)
        assert torch.equal(tensor[keep], trained[name][keep]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gist_row_in_half_precision(dtype: torch.dtype) -> None:
    model = tiny.model("llama").to(dtype)
    gisting.patch(model, tiny.tokenizer())
    weight = model.get_input_embeddings().weight
    assert weight.dtype == dtype
    # The mean is taken in float32 and rounded once to the dtype.
    assert torch.equal(weight[GIST], weight[:GIST].float().mean(0).to(dtype))


# -- saved and loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "vocabulary"), [("llama", 64), ("llama", 80), ("t5", 64), ("t5-v1.1", 64)])
def test_saved_checkpoint_is_recognised(name: str, vocabulary: int, tmp_path: Path) -> None:
    model, tokenizer = tiny.patched(name, vocab_size=vocabulary)
    with torch.no_grad():
        model.get_input_embeddings().weight[GIST] += torch.randn(32)  # a trained row
    ids, visibility = full_text(name in tiny.ENCODER_DECODERS)
    call = interval_call(name, ids, visibility)
    with torch.no_grad():
        wanted = model(**call).logits
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    assert json.loads(saved)["gist"] == model.config.gist
    assert "_attn_implementation" not in saved, "a stock transformers must be able to load it"

    auto = AutoModelForSeq2SeqLM if name in tiny.ENCODER_DECODERS else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path).eval()
    assert loaded.config.gist == model.config.gist
    assert not is_patched(loaded)
    with pytest.raises(GistError, match=r"is not patched; call gisting.patch"):
        gisting.compress(loaded, tokenizer, ["w1"])
    weights = {key: tensor.clone() for key, tensor in loaded.state_dict().items()}
    gisting.patch(loaded, GistTokenizer.from_pretrained(tmp_path))
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[key]), f"{key} was initialised again"
    assert loaded.generation_config.suppress_tokens == [GIST]
    with torch.no_grad():
        assert torch.equal(loaded(**call).logits, wanted)
    gisting.unpatch(loaded)
    assert loaded.get_input_embeddings().weight.shape[0] == vocabulary
    assert not hasattr(loaded.config, "gist")
    assert loaded.generation_config.suppress_tokens is None


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: tiny.tokenizer("llama", "alpaca"), r"template alpaca, gist token id 64"),
        (lambda: GistTokenizer(tiny.word_tokenizer(("more",)), "plain"), r"template plain, gist token id 65"),
        (lambda: GistTokenizer(tiny.word_tokenizer(), "plain", gist_token_id=70), r"template plain, gist token id 70"),
    ],
    ids=["template", "vocabulary", "gist-token-id"],
)
def test_patched_for_another_tokenizer(other: Callable[[], GistTokenizer], named: str, tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    message = (
        rf"^model was patched for tokenizer {tokenizer.fingerprint} \(template plain, gist token id 64\), "
        rf"got {other().fingerprint} \({named}\); load the tokenizer that was saved with it"
    )
    before = state_of(model)
    with pytest.raises(GistError, match=message):
        gisting.patch(model, other())
    with pytest.raises(GistError, match=message):
        gisting.compress(model, other(), ["w1"])
    assert_same_state(state_of(model), before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(GistError, match=message):
        gisting.patch(loaded, other())
    assert not is_patched(loaded)


def test_config_of_a_later_format() -> None:
    model = tiny.model("llama")
    model.config.gist = {"format": 2}
    with pytest.raises(GistError, match=r"^model.config.gist has format 2, this version reads 1; upgrade gisting"):
        gisting.patch(model, tiny.tokenizer())

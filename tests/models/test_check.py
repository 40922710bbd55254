"""``check_model``: what it accepts, that each planted fault is found, and that the model is left as it was."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.models.llama import modeling_llama

import gisting
from gisting.errors import GistError, UnsupportedModelError
from gisting.models import check as check_module
from gisting.models import decoder, encoder_decoder, registry
from gisting.models.check import ModelCheck, check_model, prove
from gisting.visibility import Visibility
from tests import tiny


@pytest.mark.parametrize("name", tiny.slow_but([*tiny.DECODERS, *tiny.ENCODER_DECODERS], "llama", "gemma3_text", "t5"))
def test_every_family_of_the_tests_passes(name: str) -> None:
    model = tiny.model(name)
    found = check_model(model)
    assert found.passed, found
    names = [one.name for one in found.comparisons]
    has_window = registry.sliding_windows(model.config) is not None
    assert names == ["mask", "gradient", "positions", "cache", *(["window"] if has_window else []), "ordinary"]
    assert all(one.error is not None and one.error <= one.bound < 1e-2 for one in found.comparisons)
    assert check_model(gisting.patch(model, tiny.tokenizer(name))).passed, "patched"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    assert check_model(tiny.model("llama").to(dtype)).passed


@pytest.mark.parametrize(
    ("name", "is_interleaved", "rotated"),
    [
        ("llama", False, (True, True, True)),
        ("gpt_neox", False, (True, True, True)),
        ("smollm3", False, (True, False, True)),
        ("cohere2", True, (True, False, True)),
        ("deepseek_v3", None, None),
        ("t5", None, None),
    ],
)
def test_rotation_is_found(name: str, is_interleaved: bool | None, rotated: tuple[bool, ...] | None) -> None:
    found = check_model(tiny.model(name))
    assert (found.is_interleaved, found.rotated) == (is_interleaved, rotated)


# -- planted faults ----------------------------------------------------------------------------------------------------


def _mask_off_by_one(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's keys are seen by one row more."""
    right = Visibility.from_attention_mask

    def wrong(mask: Tensor) -> Visibility:
        found = right(mask)
        return Visibility(found.first, torch.where(found.end < found.num_keys, found.end + 1, found.end))

    monkeypatch.setattr(Visibility, "from_attention_mask", staticmethod(wrong))


def _position_table(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned positions, in addition to the rotary ones."""
    table = nn.Embedding(128, model.config.hidden_size)

    def add(module: Any, args: Any, kwargs: Any) -> Any:
        embeds = model.get_input_embeddings()(kwargs["input_ids"])
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(embeds.shape[1])[None]
        return args, {**kwargs, "input_ids": None, "inputs_embeds": embeds + table(positions)}

    model.model.register_forward_pre_hook(add, with_kwargs=True)


def _logarithmic_scale(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries grow with the logarithm of their position, as Ministral 3's do."""
    right = modeling_llama.apply_rotary_pos_emb
    held: list[Tensor] = []
    model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: held.append(kwargs["position_ids"]), with_kwargs=True
    )

    def scaled(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k = right(q, k, *args, **kwargs)
        return q * (1 + 0.1 * torch.log1p(held[-1].clamp(min=0) / 64))[:, None, :, None], k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", scaled)


def _window_of_columns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer hides what is more than five columns back, padding included, and tells nobody."""
    layer = model.model.layers[1].self_attn
    right = layer.forward

    def windowed(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            return right(*args, attention_mask=None, **kwargs)
        if attention_mask.dtype == torch.int32:
            found = Visibility.from_attention_mask(attention_mask).windowed(5)
            return right(*args, attention_mask=found.as_attention_mask(), **kwargs)
        rows, keys = attention_mask.shape[-2:]
        age = torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)[None]
        is_old = age >= 5
        value = False if attention_mask.dtype == torch.bool else torch.finfo(attention_mask.dtype).min
        return right(*args, attention_mask=attention_mask.masked_fill(is_old, value), **kwargs)

    layer.forward = windowed


def _layer_ignores_the_mask(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is causal whatever it is told, in both kinds of attention."""
    layer = model.model.layers[1].self_attn
    right = layer.forward

    def blind(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.shape[-1] == attention_mask.shape[-2]:
            keys = attention_mask.shape[-1]
            causal = torch.ones(keys, keys, dtype=torch.bool).tril()
            attention_mask = torch.zeros(1, 1, keys, keys).masked_fill(~causal, torch.finfo(torch.float32).min)
        elif attention_mask is not None and attention_mask.dtype == torch.int32:
            first, end = attention_mask[:, 0, 0], attention_mask[:, 0, 1]
            attention_mask = Visibility(first, torch.where(end > first, 1 << 30, end)).as_attention_mask()
        return right(*args, attention_mask=attention_mask, **kwargs)

    layer.forward = blind


def _scores_outside_attention(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own attention has a sink that no one else hears of."""
    right = modeling_llama.eager_attention_forward

    def with_sink(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        sink = torch.zeros_like(k[:, :, :1])
        mask = None if mask is None else nn.functional.pad(mask, (1, 0))
        return right(module, q, torch.cat([sink, k], 2), torch.cat([sink, v], 2), mask, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", with_sink)


def _cache_forgets_a_layer(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one layer held of the gists is zero when generation continues."""
    right = decoder.prefix_states

    def forgetful(*args: Any) -> Any:
        cache = right(*args)
        cache.keys[1].zero_()
        cache.values[1].zero_()
        return cache

    monkeypatch.setattr(decoder, "prefix_states", forgetful)


def _detached_layer(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient reaches the keys."""
    right = DynamicLayer.update

    def update(self: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        key, value = right(self, key, value, *args, **kwargs)
        return key.detach(), value

    monkeypatch.setattr(DynamicLayer, "update", update)


def _own_choice_of_attention(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text without gist tokens takes another way once the model is patched."""
    right = registry._attention_forward

    def nudged(module: Any, q: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = right(module, q, *args, **kwargs)
        return out * (1 + 2**-22), weights

    monkeypatch.setattr(registry, "_attention_forward", nudged)


def _states_dropped(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder reads the placeholders' states instead of the gists'."""
    right = encoder_decoder.prefix_states

    def forgetful(*args: Any) -> Any:
        cache = right(*args)
        cache.last_hidden.zero_()
        return cache

    monkeypatch.setattr(encoder_decoder, "prefix_states", forgetful)


@pytest.mark.parametrize(
    ("name", "plant", "failed"),
    [
        ("llama", _mask_off_by_one, "mask"),
        ("gemma3_text", _mask_off_by_one, "mask"),
        ("t5", _mask_off_by_one, "mask"),
        ("llama", _position_table, "positions"),
        ("llama", _logarithmic_scale, "positions"),
        ("llama", _window_of_columns, "cache"),
        ("llama", _layer_ignores_the_mask, "mask"),
        ("llama", _scores_outside_attention, "mask"),
        ("llama", _detached_layer, "gradient"),
        ("llama", _cache_forgets_a_layer, "cache"),
        ("t5", _states_dropped, "cache"),
        ("llama", _own_choice_of_attention, "ordinary"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else str(value),
)
def test_planted_fault_is_found(
    name: str, plant: Callable[[Any, pytest.MonkeyPatch], None], failed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "_known", {})
    model = tiny.model(name)
    plant(model, monkeypatch)
    found = check_model(model)
    assert not found.passed
    assert found.failed is not None
    assert found.failed.name == failed, found
    with pytest.raises(UnsupportedModelError, match=rf"^{name} cannot be gisted: {failed} failed, "):
        gisting.patch(model, tiny.tokenizer(name))


# -- the model is left as it was ---------------------------------------------------------------------------------------


def assert_same(found: Any, wanted: Any) -> None:
    """Compare tensors bit by bit, at any depth."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        found, wanted = list(found.values()), list(wanted.values())
    if isinstance(wanted, Tensor):
        assert torch.equal(found, wanted)
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == wanted


@pytest.mark.parametrize("name", ["llama-dynamic", "gemma3_text", "t5"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = tiny.model(name, attn_implementation="eager").train()
    model.get_input_embeddings().weight.grad = torch.ones_like(model.get_input_embeddings().weight)
    modes = {path: module.training for path, module in model.named_modules()}

    def state() -> Any:
        return (
            {key: tensor.clone() for key, tensor in model.state_dict().items()},
            {key: (id(tensor), tensor.clone()) for key, tensor in model.named_buffers()},
            copy.deepcopy(model.config.to_dict()),
            model.generation_config.to_dict(),
            {path: module.training for path, module in model.named_modules()},
            {key: None if one.grad is None else one.grad.clone() for key, one in model.named_parameters()},
            [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
            [vars(module).keys() for module in model.modules()],
            torch.get_rng_state(),
        )

    before = state()
    assert check_model(model).passed
    assert_same(state(), before)
    assert all(modes.values())
    assert model.config._attn_implementation == "eager"


def test_under_no_grad_inference_mode_and_frozen() -> None:
    model = tiny.model("llama").requires_grad_(False)
    with torch.no_grad():
        assert check_model(model).passed
    with torch.inference_mode():
        assert check_model(model).passed


def test_what_cannot_be_run_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "_known", {})
    model = tiny.model("llama").to("meta")
    found = check_model(model)
    assert not found.passed
    assert found.comparisons == ()
    assert str(found) == ("llama: not checked, because model.embed_tokens.weight is on the meta device, without values")
    assert "checked" not in gisting.patch(model, tiny.tokenizer()).config.gist


def test_too_little_memory_is_not_a_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")

    def forward(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(GistError, match=r"^not enough memory to try the model \(CUDA out of memory\.\); patch\(check="):
        check_model(model)


def test_arguments() -> None:
    with pytest.raises(GistError, match=r"^model must be a transformers PreTrainedModel, got Linear$"):
        check_model(nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    config = AutoConfig.for_model("bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    bloom = AutoModelForCausalLM.from_config(config)
    message = (
        "^bloom cannot be gisted: BloomForCausalLM computes its attention without transformers' attention interface"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        check_model(bloom)


def test_half_precision_says_when_it_cannot_tell() -> None:
    """With values that say nothing, no attention matters."""
    model = tiny.model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-6)
    found = check_model(model.to(torch.bfloat16)).failed
    assert found is not None
    assert found.problem == "rounding hides what the mask does; load the model in float32"


# -- the proof ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[ModelCheck]:
    """Collect the checks that are really run, in a process that knows none."""
    found: list[ModelCheck] = []
    right = check_module.check_model

    def counted(model: PreTrainedModel) -> ModelCheck:
        found.append(right(model))
        return found[-1]

    monkeypatch.setattr(check_module, "check_model", counted)
    monkeypatch.setattr(check_module, "_known", {})
    return found


def test_a_proof_is_kept_and_read(runs: list[ModelCheck], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.patched("cohere2")
    assert len(runs) == 1
    assert model.config.gist["checked"]["rotary"] == {"is_interleaved": True, "layers": [True, False, True]}
    model.save_pretrained(tmp_path)
    check_module._known.clear()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    gisting.patch(loaded, tokenizer)
    assert len(runs) == 1, "a checkpoint of the same versions is not checked again"
    assert loaded.config.gist == model.config.gist

    monkeypatch.setattr(check_module, "__version__", "9.9")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    gisting.patch(again, tokenizer)
    assert len(runs) == 2, "another version"
    assert again.config.gist["checked"]["gisting"] == "9.9"
    changed = AutoModelForCausalLM.from_pretrained(tmp_path)
    changed.config.rms_norm_eps = changed.config.layer_norm_eps = 0.5
    gisting.patch(changed, tokenizer)
    assert len(runs) == 3, "another config"


def test_a_checkpoint_without_a_proof_is_checked(runs: list[ModelCheck], tmp_path: Any) -> None:
    """Those of earlier versions have none."""
    model, tokenizer = tiny.patched("llama")
    proof = model.config.gist.pop("checked")
    model.save_pretrained(tmp_path)
    check_module._known.clear()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    gisting.patch(loaded, tokenizer)
    assert len(runs) == 2
    assert loaded.config.gist["checked"] == proof


def test_a_process_remembers_only_models_that_run_alike(runs: list[ModelCheck]) -> None:
    prove(tiny.model("llama"))
    prove(tiny.model("llama"))
    assert len(runs) == 1
    prove(tiny.model("llama", num_hidden_layers=2))
    assert len(runs) == 2, "another config"
    prove(tiny.model("llama", attn_implementation="eager"))
    assert len(runs) == 3, "another attention"
    prove(tiny.model("llama").to(torch.bfloat16))
    assert len(runs) == 4, "another dtype"
    model: Any = tiny.model("llama")
    model.model.layers[1].mlp = nn.Identity()
    prove(model)
    assert len(runs) == 5, "another module"
    for _ in range(2):
        model = tiny.model("llama")
        model.model.layers[1].mlp.forward = types.MethodType(lambda self, x: x, model.model.layers[1].mlp)
        prove(model)
    assert len(runs) == 7, "a forward of its own is never remembered"
    model = tiny.model("llama")
    model.model.layers[0].register_forward_hook(lambda module, args, out: None)
    prove(model)
    assert len(runs) == 8, "nor a hook"


def test_without_a_check_gists_cannot_be_chained() -> None:
    with pytest.warns(UserWarning, match=r"^llama is patched without a check, so its gists may be wrong; "):
        model = gisting.patch(tiny.model("llama"), tiny.tokenizer(), check=False)
    caches = [gisting.compress(model, tiny.tokenizer(), [prompt]) for prompt in ("w1 w2", "w3")]
    with pytest.raises(GistError, match=r"^caches do not say how their keys are rotated"):
        gisting.GistCache.chain(caches)


@pytest.mark.parametrize(
    "look",
    [
        lambda table, places: table[places],
        lambda table, places: nn.functional.embedding(places, table),
        lambda table, places: table.index_select(0, places),
        lambda table, places: table.gather(0, places[:, None]),
    ],
    ids=["index", "embedding", "index_select", "gather"],
)
def test_a_position_below_0_finds_nothing(look: Callable[[Tensor, Tensor], Tensor]) -> None:
    """On a GPU the error of the operator itself would be the last thing that the process computes there."""
    table = torch.randn(8, 2)
    with check_module._NoNegativeIndex():
        assert look(table, torch.tensor([0, 7])).shape[0] == 2
        with pytest.raises(IndexError, match=r"^it looks positions up in a table, and there is none at -2$"):
            look(table, torch.tensor([3, -2]))


def test_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert check_model(tiny.model("llama")).passed

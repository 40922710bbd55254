"""``fingerprint``: it changes if and only if something changes a hidden state, and it is quick.

Each change is made to a model that is small enough to be read completely and to one whose matrices are sampled.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import gisting
from gisting.errors import CacheMismatchError, GistError
from gisting.models import fingerprint as fingerprint_module
from gisting.models.adapters import Adapter, attach
from gisting.models.fingerprint import base_fingerprint, fingerprint, walk
from gisting.models.patch import patch
from gisting.models.rotary import layer_frequencies
from tests import tiny

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "whole": {},
        "sampled": {"vocab_size": 5000, "hidden_size": 160, "intermediate_size": 240, "num_key_value_heads": 4}
        | {"head_dim": 40},
    },
    "t5": {"whole": {}, "sampled": {"vocab_size": 5000, "d_model": 160, "d_ff": 240, "d_kv": 40}},
}
both_sizes = pytest.mark.parametrize(("name", "size"), [(name, size) for name in SIZES for size in SIZES[name]])


def projections(model: PreTrainedModel) -> list[Tensor]:
    """Return the query projections of the stack that reads prompts. They are square if matrices are sampled."""
    names = re.compile(r"^model\..*q_proj\.weight$|^encoder.*SelfAttention\.q\.weight$")
    return [tensor.data for name, tensor in model.named_parameters() if names.match(name)]


# -- what must show ----------------------------------------------------------------------------------------------------


def _train_a_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids = torch.randint(4, 60, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def _train_a_small_step_of_one_norm(model: Any) -> None:
    next(tensor for name, tensor in model.named_parameters() if "norm" in name).data.mul_(1 + 2**-20)


def _edit_one_number_of_one_norm(model: Any) -> None:
    next(tensor for name, tensor in model.named_parameters() if "norm" in name).data[5] += 1e-3


def _edit_the_gist_row(model: Any) -> None:
    model.get_input_embeddings().weight.data[model.config.gist["gist_token_id"], 3] += 1e-3


def _merge_a_delta(model: Any) -> None:
    """Change one projection of the last layer as a merged adapter of rank 1 would."""
    weight = projections(model)[-1]
    weight += 1e-3 * torch.outer(torch.randn(weight.shape[0]), torch.randn(weight.shape[1]))


def _round_a_tensor(model: Any) -> None:
    weight = projections(model)[-1]
    weight.copy_(weight.bfloat16())


def _replace_a_tensor_by_one_of_the_same_statistics(model: Any) -> None:
    weight = projections(model)[1]
    weight.copy_(weight.flatten()[torch.randperm(weight.numel())].view_as(weight))


def _edit_a_row(model: Any) -> None:
    projections(model)[0][17] += 1e-3


def _edit_the_last_row_of_the_embedding(model: Any) -> None:
    model.get_input_embeddings().weight.data[-1] += 1e-3


def _edit_a_column(model: Any) -> None:
    projections(model)[0][:, 23] += 1e-3


def _exchange_two_rows(model: Any) -> None:
    weight = projections(model)[0]
    weight[[3, 30]] = weight[[30, 3]]


def _exchange_two_columns(model: Any) -> None:
    weight = projections(model)[0]
    weight[:, [3, 30]] = weight[:, [30, 3]]


def _exchange_two_layers(model: Any) -> None:
    layers = model.get_encoder().block if model.config.is_encoder_decoder else model.base_model.layers
    layers[1], layers[2] = layers[2], layers[1]


def _change_the_config(model: Any) -> None:
    if model.config.is_encoder_decoder:
        model.config.relative_attention_max_distance = 40
    else:
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e5}


CHANGES = [value for name, value in list(globals().items()) if re.match("_(train|edit|merge|round|re|ex|change)", name)]


@both_sizes
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_changes(name: str, size: str, change: Callable[[PreTrainedModel], None]) -> None:
    model, tokenizer = tiny.patched(name, **SIZES[name][size])
    is_sampled = walk(projections(model)[0]).numel() < projections(model)[0].numel()
    assert is_sampled == (size == "sampled")
    before = fingerprint(model)
    assert re.fullmatch(name + "/[0-9a-f]{12}", before)
    cache = gisting.compress(model, tokenizer, ["w1"])
    change(model)
    after = fingerprint(model)
    assert after != before
    with pytest.raises(CacheMismatchError, match=f"^cache was made for {before}, this model is {after}; compress"):
        gisting.generate(model, tokenizer, ["w1"], cache=cache)


def test_a_bias_shows() -> None:
    model: Any = tiny.model("qwen2")
    before = fingerprint(model)
    bias = next(tensor for name, tensor in model.named_parameters() if name.endswith("k_proj.bias"))
    bias.data[-1] += 1e-3
    assert fingerprint(model) != before


def test_a_persistent_buffer_shows_and_what_is_made_anew_does_not() -> None:
    """Quantised layers of some libraries keep weights and scales in persistent buffers."""
    model: Any = tiny.model("llama")
    before = fingerprint(model)
    model.base_model.layers[0].mlp.register_buffer("scratch", torch.ones(8), persistent=False)
    assert fingerprint(model) == before
    model.base_model.layers[0].mlp.register_buffer("scales", torch.ones(8, dtype=torch.int8))
    with_scales = fingerprint(model)
    assert with_scales != before
    model.base_model.layers[0].mlp.scales[3] = 2
    assert fingerprint(model) not in (before, with_scales)


ROTARY = {"llama": "inv_freq", "llama-dynamic": "original_inv_freq", "phi3-longrope": "original_inv_freq"} | {
    "gemma3_text": "sliding_attention_inv_freq"
}


@pytest.mark.parametrize(("name", "buffer"), ROTARY.items())
def test_rotary_frequencies_show_where_keys_turn_by_them(name: str, buffer: str) -> None:
    """A copy that is not used in the computation does not show."""
    model: Any = tiny.model(name)
    before = fingerprint(model)
    idle = buffer.replace("original_", "") if "original_" in buffer else buffer.replace("inv_freq", "original_inv_freq")
    getattr(model.base_model.rotary_emb, idle).mul_(2)
    assert fingerprint(model) == before
    getattr(model.base_model.rotary_emb, buffer)[-1] += 1e-3
    assert fingerprint(model) != before


@pytest.mark.parametrize("name", ROTARY)
def test_a_model_cast_is_another_than_one_loaded(name: str, tmp_path: Path) -> None:
    """``.to(torch.bfloat16)`` rounds the frequencies, loading does not, so their keys do not belong in one cache."""
    tiny.model(name).bfloat16().save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    cast: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    whole = fingerprint(cast)
    cast.to(torch.bfloat16)
    assert layer_frequencies(loaded) != layer_frequencies(cast)
    assert fingerprint(loaded) == whole != fingerprint(cast)
    caches = [
        gisting.compress(gisting.patch(model, tiny.tokenizer(name)), tiny.tokenizer(name), ["w1"], 1)
        for model in (loaded, cast)
    ]
    with pytest.raises(CacheMismatchError, match=r"^caches belong to different origins"):
        gisting.GistCache.cat(caches)


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_stays_where_frequencies_change_with_the_length(name: str) -> None:
    model: Any = tiny.model(name)
    before = fingerprint(model)
    used = model.base_model.rotary_emb.inv_freq.clone()
    for length, is_other in ((model.config.max_position_embeddings + 8, True), (4, False)):
        with torch.no_grad():
            model(input_ids=torch.full((1, length), 5))
        assert torch.equal(model.base_model.rotary_emb.inv_freq, used) != is_other
        assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("name", "module", "attribute"),
    [
        ("llama", "rotary_emb", "attention_scaling"),
        ("gemma3_text", "rotary_emb", "full_attention_attention_scaling"),
        ("llama", "layers.1.self_attn", "scaling"),
        ("gpt_neox", "layers.1.attention", "scaling"),
    ],
)
def test_a_factor_of_attention_shows(name: str, module: str, attribute: str) -> None:
    model: Any = tiny.model(name)
    before = fingerprint(model)
    owner = model.base_model.get_submodule(module)
    setattr(owner, attribute, getattr(owner, attribute) * 1.1)
    assert fingerprint(model) != before


def test_models_of_all_families_differ() -> None:
    names = [name for name in tiny.DECODERS if name != "llama-untied"]  # llama is untied by default
    found = {name: fingerprint(tiny.model(name)) for name in [*names, *tiny.ENCODER_DECODERS]}
    assert len(set(found.values())) == len(found)
    for name, text in found.items():
        assert text.startswith(name.split("-")[0] + "/")


# -- adapters ----------------------------------------------------------------------------------------------------------


def with_adapter(model: PreTrainedModel, name: str = "one") -> Any:
    """Inject an adapter of rank 2 whose product is not zero."""
    from peft import LoraConfig

    tiny.skip_without_adapters_of_transformers()
    adapted: Any = model
    adapted.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name=name)
    return adapted


@pytest.mark.parametrize("size", ["whole", "sampled"])
def test_adapters(size: str) -> None:
    """Each state of an adapter has its own fingerprint, and returning to a state returns to its fingerprint."""
    model: Any = tiny.patched("llama", **SIZES["llama"][size])[0]
    ids = torch.arange(4, 12)[None]
    seen: dict[str, Tensor] = {}

    def visit() -> str:
        found = fingerprint(model)
        with torch.no_grad():
            seen[found] = model(input_ids=ids).logits
        return found

    plain = visit()
    with_adapter(model)
    active = visit()
    model.disable_adapters()
    disabled = visit()
    assert torch.equal(seen[disabled], seen[plain])
    model.enable_adapters()
    assert fingerprint(model) == active
    with_adapter(model, "two")
    model.set_adapter("two")
    second = visit()
    model.set_adapter("one")
    other_again = visit()
    layer = model.base_model.layers[0].self_attn.q_proj
    layer.scaling["one"] *= 2
    rescaled = visit()
    layer.scaling["one"] /= 2
    assert fingerprint(model) == other_again
    layer.merge(adapter_names=["one"])
    merged = visit()
    names = [plain, active, disabled, second, other_again, rescaled, merged]
    assert len(set(names)) == len(names)
    assert not torch.allclose(seen[plain], seen[active])
    assert torch.allclose(seen[active], seen[merged], atol=1e-4)


def test_merged_and_unloaded_adapter() -> None:
    """It is an ordinary model again, with other weights."""
    from peft import LoraConfig, LoraModel

    model = tiny.patched("llama", **SIZES["llama"]["sampled"])[0]
    before = fingerprint(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    merged: Any = LoraModel(model, {"one": config}, "one").merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert fingerprint(merged) != before


# -- what must not show ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", tiny.slow_but([*tiny.DECODERS, *tiny.ENCODER_DECODERS], "llama", "gemma2", "phi3-longrope", "t5")
)
def test_stays(name: str, tmp_path: Path) -> None:
    """The fingerprint stays through modes, copies, use, files and lossless casts, which change no hidden state."""
    auto = AutoModelForSeq2SeqLM if name in tiny.ENCODER_DECODERS else AutoModelForCausalLM
    tiny.model(name).bfloat16().save_pretrained(tmp_path / "weights")
    settings: Any = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    model: Any = auto.from_pretrained(tmp_path / "weights", **settings)  # a cast would round rotary frequencies
    tokenizer = tiny.tokenizer(name)
    gisting.patch(model, tokenizer)
    before = fingerprint(model)
    assert fingerprint(model.train()) == before
    assert fingerprint(model.eval()) == before
    assert fingerprint(model.requires_grad_(False)) == before
    assert fingerprint(copy.deepcopy(model)) == before
    gisting.generate(model, tokenizer, ["w1"], prompts=["w2"], max_new_tokens=2)
    assert fingerprint(model) == before
    model.config.use_cache = not model.config.use_cache
    assert fingerprint(model) == before
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = gisting.patch(auto.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager"), tokenizer)
        assert loaded.dtype == dtype
        assert fingerprint(loaded) == before, dtype
    assert fingerprint(model.float()) == before


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("pad_token_id", 3),
        ("bos_token_id", None),
        ("eos_token_id", [2, 5]),
        ("decoder_start_token_id", 0),
        ("output_hidden_states", True),
        ("output_attentions", False),
        ("return_dict", True),
        ("use_cache", False),
        ("initializer_range", 0.5),
        ("id2label", {0: "no"}),
        ("name_or_path", "elsewhere"),
        ("tokenizer_class", "Other"),
    ],
)
def test_settings_that_change_no_state(name: str, setting: str, value: object) -> None:
    """Caches stay valid when a setting of generation, of losses or of what a call returns changes."""
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, ["w1 w2"], 2)
    before, answer = fingerprint(model), gisting.generate(model, tokenizer, ["w5"], cache=cache, max_new_tokens=4)
    setattr(model.config, setting, value)
    assert fingerprint(model) == before
    assert gisting.generate(model, tokenizer, ["w5"], cache=cache, max_new_tokens=4) == answer


def test_settings_in_a_nested_config() -> None:
    model: Any = tiny.model("llama")
    model.config.inner = {"pad_token_id": 3, "size": 4}
    before = fingerprint(model)
    model.config.inner = {"pad_token_id": 5, "size": 4}
    assert fingerprint(model) == before
    model.config.inner = {"pad_token_id": 5, "size": 6}
    assert fingerprint(model) != before


@pytest.mark.parametrize("name", ["qwen2", "t5"])
def test_stays_where_tied_weights_share_no_memory(name: str) -> None:
    changes = {"tie_word_embeddings": True}
    model: Any = tiny.model(name, **changes)
    before = fingerprint(model)
    head: Any = model.get_output_embeddings()
    assert head.weight is model.get_input_embeddings().weight
    head.weight = nn.Parameter(head.weight.detach().clone())
    assert fingerprint(model) == before
    head.weight.data += 1e-3
    assert fingerprint(model) != before


def test_stays_for_other_memory_layouts() -> None:
    """Only values count, not the memory layout: a transposed view, and one inside a larger tensor."""
    model: Any = tiny.model("llama", **SIZES["llama"]["sampled"])
    before = fingerprint(model)
    first, second, *_ = [module for module in model.modules() if isinstance(module, nn.Linear)]
    first.weight = nn.Parameter(first.weight.detach().T.contiguous().T)
    assert not first.weight.is_contiguous()
    wide = torch.zeros(2, *second.weight.shape)
    wide[1] = second.weight.detach()
    second.weight = nn.Parameter(wide[1])
    assert fingerprint(model) == before


def test_stays_when_wrapped_by_compile() -> None:
    model: Any = with_adapter(tiny.model("llama"))
    before = fingerprint(model)
    model.base_model.layers[0].self_attn = torch.compile(model.base_model.layers[0].self_attn, backend="eager")
    model.base_model.layers[1] = torch.compile(model.base_model.layers[1], backend="eager")
    model.base_model.layers[2].self_attn.q_proj.compile(backend="eager")
    assert fingerprint(model) == before
    assert fingerprint(torch.compile(model, backend="eager")) == before  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_stays_on_an_accelerator() -> None:
    model: Any = tiny.model("llama", **SIZES["llama"]["sampled"])
    before = fingerprint(model)
    model.base_model.layers[1].cuda()
    assert fingerprint(model) == before, "on two devices"
    assert fingerprint(model.cuda()) == before


# -- the walk ----------------------------------------------------------------------------------------------------------


def sampled(tensor: Tensor, *, long: int = 1 << 20, diagonals: int = 8) -> Tensor:
    """Make ``walk`` sample small tensors, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint_module, "_WHOLE", 0)
        patch.setattr(fingerprint_module, "_LONG", long)
        patch.setattr(fingerprint_module, "_DIAGONALS", diagonals)
        return walk(tensor)


@pytest.mark.parametrize(
    ("shape", "diagonals", "wanted"),
    [
        ((4, 3), 1, [0, 4, 8, 9]),
        ((2, 6), 1, [0, 2, 4, 7, 9, 11]),
        ((7, 3), 1, [0, 4, 8, 9, 13, 17, 18]),
        ((3, 3), 1, [0, 4, 8]),
        ((2, 2, 3), 1, [0, 4, 8, 9]),  # as (4, 3)
        ((5,), 1, [0, 1, 2, 3, 4]),
        ((1, 1), 1, [0]),
        ((4, 4), 2, [0, 2, 5, 7, 8, 10, 13, 15]),
        ((5, 4), 2, [0, 2, 5, 7, 8, 10, 13, 15, 16, 18]),
        ((2, 3), 8, [0, 1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_walk(shape: tuple[int, ...], diagonals: int, wanted: list[int]) -> None:
    matrix = torch.arange(torch.Size(shape).numel()).view(shape)
    assert sorted(sampled(matrix, diagonals=diagonals).tolist()) == wanted


sides = st.integers(1, 40)


@given(sides, sides, st.booleans())
def test_walk_is_its_definition(rows: int, columns: int, is_transposed: bool) -> None:
    matrix = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns)
    matrix = matrix.T if is_transposed else matrix
    rows, columns = matrix.shape
    side = min(rows, columns)
    count = min(8, side)
    wanted = [
        int(matrix[i, (i + shift) % columns] if rows > columns else matrix[(i + shift) % rows, i])
        for shift in (number * side // count for number in range(count))
        for i in range(max(rows, columns))
    ]
    assert len(set(wanted)) == len(wanted)
    assert sorted(sampled(matrix).tolist()) == sorted(wanted)


@given(st.integers(1, 150), st.integers(1, 150), st.data())
def test_every_block_of_the_promised_size_shows(rows: int, columns: int, data: st.DataObject) -> None:
    """``r + c > ceil(min(R, C) / 8)``, with the smallest blocks that satisfy it."""
    promised = -(-min(rows, columns) // 8) + 1
    height = data.draw(st.integers(max(1, promised - columns), min(rows, promised)), "height")
    width = data.draw(st.integers(max(1, promised - height), min(columns, max(1, promised - height))), "width")
    top = data.draw(st.integers(0, rows - height), "top")
    left = data.draw(st.integers(0, columns - width), "left")
    matrix = torch.zeros(rows, columns)
    before = sampled(matrix)
    matrix[top : top + height, left : left + width] = 1
    assert not torch.equal(sampled(matrix), before)


def test_a_block_that_one_diagonal_would_miss_shows() -> None:
    matrix = torch.randn(512, 256)
    before = walk(matrix)
    matrix[:128, 140:196] += 1
    assert not torch.equal(walk(matrix), before)


def test_a_block_can_be_smaller_and_missed() -> None:
    """The bound is tight: a block that is smaller by one fits between two diagonals."""
    matrix = torch.zeros(256, 256)
    before = walk(matrix)
    matrix[16:32, 33:48] = 1  # 16 + 15 = 31; the promise holds above 32
    assert torch.equal(walk(matrix), before)


@given(st.lists(st.integers(1, 12), min_size=2, max_size=4), st.data())
def test_every_row_and_every_column_shows(shape: list[int], data: st.DataObject) -> None:
    tensor = torch.randn(shape)
    before = sampled(tensor).clone()
    matrix = tensor.view(-1, shape[-1])
    if data.draw(st.booleans(), "is a row"):
        matrix[data.draw(st.integers(0, matrix.shape[0] - 1), "row")] += 1
    else:
        matrix[:, data.draw(st.integers(0, matrix.shape[1] - 1), "column")] += 1
    assert not torch.equal(sampled(tensor), before)


@given(st.integers(101, 2000), st.integers(1, 3))
def test_walk_of_long_and_narrow_tensors(length: int, width: int) -> None:
    """Packed weights have one value per row. Read as a square, they cost the square root of their size."""
    tensor = torch.arange(length * width).view(length, width)
    side = int((length * width) ** 0.5)
    found = sampled(tensor, long=100).tolist()
    assert found[0] == 0
    assert found[-1] == length * width - 1 or length * width % side == 0
    assert len(found) <= 8 * (side + 2) + side + 2
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("changed", "is_seen_in_theory"), [(1, 8 / 300), (38, 1 - (1 - 8 / 300) ** 38), (400, 1.0)], ids=str
)
def test_what_is_missed(changed: int, is_seen_in_theory: float) -> None:
    """Check the probabilities in the docstring for changes of single values of a 300 x 300 matrix."""
    before = walk(torch.zeros(300, 300))
    seen = 0
    for _ in range(1000):
        matrix = torch.zeros(300, 300)
        matrix.view(-1)[torch.randperm(90_000)[:changed]] = 1.0
        seen += not torch.equal(walk(matrix), before)
    # Four standard deviations of a thousand trials.
    assert (
        abs(seen / 1000 - is_seen_in_theory) <= 4 * (is_seen_in_theory * (1 - is_seen_in_theory) / 1000) ** 0.5 + 1e-3
    )


@pytest.mark.parametrize(
    "dtype",
    "float64 float16 float8_e4m3fn float8_e5m2 int8 uint8 uint16 int64 bool complex64".split(),
)
def test_other_dtypes(dtype: str) -> None:
    """The dtypes of quantised weights are accepted, and a changed value shows."""
    model: Any = tiny.model("llama")
    module, kind = model.base_model.layers[0], getattr(torch, dtype)
    module.register_buffer("packed", torch.arange(20_000).remainder(2).view(100, 200).to(kind))
    before = fingerprint(model)
    module.packed = (torch.arange(20_000) // 200 == 50).view(100, 200).to(kind)  # only the shape stays
    changed = fingerprint(model)
    module.packed = (torch.arange(20_000) // 200 == 51).view(100, 200).to(kind)
    assert len({before, changed, fingerprint(model)}) == 3
    module.packed = torch.zeros(0, 7, dtype=kind)
    assert fingerprint(model) != before


def test_float64_is_read_to_its_last_bit() -> None:
    model: Any = tiny.model("llama").double()
    before = fingerprint(model)
    projections(model)[0][0, 0] *= 1 + 2**-50
    assert fingerprint(model) != before


def test_tensors_made_of_tensors() -> None:
    """Quantised and distributed weights consist of several tensors, and each of them counts."""
    model: Any = tiny.model("llama")
    layer = model.base_model.layers[0].mlp.down_proj
    weight = layer.weight.detach()
    found = set()
    for second in (torch.zeros_like(weight), torch.ones_like(weight)):
        layer.weight = nn.Parameter(TwoTensor(weight.clone(), second), requires_grad=False)
        found.add(fingerprint(model))
    assert len(found) == 2


def test_meta_device_is_refused() -> None:
    model: Any = tiny.model("llama")
    model.base_model.layers[1].to("meta")
    message = (
        r"^model.layers.1.self_attn.q_proj.weight is on the meta device, so the model cannot be identified; "
        r"load the complete model, without offloading to disk$"
    )
    with pytest.raises(GistError, match=message):
        fingerprint(model)


# -- how long it takes -------------------------------------------------------------------------------------------------


def llama_3_8b(num_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return model.bfloat16().to_empty(device="cpu")


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Use one thread: there are many copies of few values, and threads would spend their time waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.slow
def test_eight_billion_parameters_in_less_than_a_second() -> None:
    """Llama 3 8B in bfloat16, in CPU time. Its memory is allocated and never written, so it takes no space and all its
    pages are one page of zeros. Real weights take about twice as long, see below.
    """
    model = llama_3_8b(32)
    assert sum(parameter.numel() for parameter in model.parameters()) > 8.0e9
    assert 17e6 < sum(walk(tensor).numel() for tensor in model.state_dict().values()) < 18e6
    first = fingerprint(model)
    started = time.process_time()
    assert fingerprint(model) == first
    assert time.process_time() - started < 0.5


@pytest.mark.usefixtures("_one_thread")
def test_a_layer_that_is_there_takes_its_share_of_half_a_second() -> None:
    """One layer of 32, with all its pages filled."""
    layer = llama_3_8b(1).model.layers[0]
    for parameter in layer.parameters():
        parameter.data.view(torch.int16).fill_(17)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        for parameter in layer.parameters():
            walk(parameter)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.5 / 32


# -- the stock model under a patched one -------------------------------------------------------------------------------

ROWS = {"added": {"vocab_size": 64}, "replaced": {"vocab_size": 80}}


def _draw(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "name", tiny.slow_but([*tiny.DECODERS, *tiny.ENCODER_DECODERS], "llama", "llama-untied", "gemma3_text", "t5-v1.1")
)
def test_stock_patched_and_adapted_models_have_one_base_fingerprint(name: str, rows: str) -> None:
    model = tiny.model(name, **ROWS[rows])
    stock = fingerprint(model)
    assert base_fingerprint(model) == stock
    patch(model, tiny.tokenizer(name))
    assert fingerprint(model) != stock
    assert base_fingerprint(model) == stock
    for kind in ("gist-lora", "embeddings"):
        adapted = copy.deepcopy(model)
        attach(adapted, Adapter(kind, rank=2))
        _draw(adapted)
        assert base_fingerprint(adapted) == stock
        next(tensor for key, tensor in adapted.named_parameters() if "norm" in key).data[1] += 1e-3
        assert base_fingerprint(adapted) != stock
    attach(model, Adapter("lora", rank=2))
    assert base_fingerprint(model) != stock


@pytest.mark.parametrize("name", SIZES)
def test_the_row_that_the_gist_token_replaced_counts_in_a_sampled_table(name: str) -> None:
    model = tiny.model(name, **SIZES[name]["sampled"])
    stock = fingerprint(model)
    patch(model, tiny.tokenizer(name))
    assert base_fingerprint(model) == stock
    model._gist_undo.replaced_rows[0] += 1e-3  # pyright: ignore
    assert base_fingerprint(model) != stock


def test_a_cast_changes_the_base_fingerprint_as_it_changes_that_of_the_stock_model() -> None:
    model, stock = tiny.patched("llama", vocab_size=80)[0], tiny.model("llama", vocab_size=80)
    attach(model, Adapter("gist-lora", rank=2))
    before = base_fingerprint(model)
    assert base_fingerprint(model.to(torch.bfloat16)) == fingerprint(stock.to(torch.bfloat16)) != before


def test_a_checkpoint_that_was_saved_patched_has_the_base_fingerprint_of_its_stock_model(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    gisting.save_pretrained(model, tokenizer, tmp_path)
    _edit_the_gist_row(model)
    loaded, _ = gisting.load(tmp_path)
    assert fingerprint(loaded) != fingerprint(model)
    assert base_fingerprint(loaded) == base_fingerprint(model) == fingerprint(tiny.model("llama"))

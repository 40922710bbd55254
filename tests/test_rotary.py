"""Rotations by hand, against complex numbers, and as read from models."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gisting.errors import GistError
from gisting.models.rotary import rotary_of
from gisting.rotary import Rotary
from tests import tiny

QUARTER = math.pi / 2


def by(*positions: int) -> Tensor:
    return torch.tensor(positions)


# -- arithmetic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rotary", "expected"),
    [
        # Numbers 0 1 2 3 4 5 by a quarter turn: (x, y) becomes (-y, x); the second pair rotates twice as fast.
        pytest.param(Rotary(((QUARTER, 2 * QUARTER),), (0,)), [-2, -1, 0, -3, 4, 5], id="halves-of-the-first-four"),
        pytest.param(Rotary(((QUARTER, 2 * QUARTER),), (0,), True), [-1, 0, -2, -3, 4, 5], id="neighbours"),
        pytest.param(Rotary(((QUARTER,) * 3,), (0,)), [-3, -4, -5, 0, 1, 2], id="the-whole-head"),
        pytest.param(Rotary(((QUARTER,),), (None,)), [0, 1, 2, 3, 4, 5], id="no-rotation"),
    ],
)
def test_a_turn_by_hand(rotary: Rotary, expected: list[int]) -> None:
    turned = rotary.rotate(0, torch.arange(6.0).reshape(1, 1, 1, 6), by(1))
    assert torch.allclose(turned.flatten(), torch.tensor(expected, dtype=torch.float), atol=1e-6)


def test_every_layer_turns_by_its_own_set() -> None:
    rotary = Rotary(((0.5,), (2.0,)), (1, None, 0))
    keys = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    for layer, frequency in enumerate((2.0, 0.0, 0.5)):
        x, y = rotary.rotate(layer, keys, by(3)).flatten().tolist()
        assert (x, y) == pytest.approx((math.cos(3 * frequency), math.sin(3 * frequency)), abs=1e-6)


def test_every_prompt_or_every_slot_moves_on_its_own() -> None:
    rotary = Rotary(((1.0, 0.1, 0.01),), (0,))
    keys = torch.randn(2, 3, 4, 7)
    by_prompt = rotary.rotate(0, keys, by(5, 0))
    by_slot = rotary.rotate(0, keys, torch.tensor([[5] * 4, [0, 1, 2, 3]]))
    assert torch.equal(by_prompt[0], by_slot[0])
    assert torch.equal(by_prompt[1], keys[1])
    for slot in range(4):
        assert torch.equal(by_slot[1:, :, slot : slot + 1], rotary.rotate(0, keys[1:, :, slot : slot + 1], by(slot)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pairs=st.integers(1, 5),
    spare=st.integers(0, 3),
    is_interleaved=st.booleans(),
    positions=st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_a_turn_is_a_product_of_complex_numbers(
    pairs: int, spare: int, is_interleaved: bool, positions: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.rand(pairs, generator=generator, dtype=torch.float64)
    keys = torch.randn(len(positions), 2, 3, 2 * pairs + spare, generator=generator, dtype=torch.float64)
    turned = Rotary((tuple(frequencies.tolist()),), (0,), is_interleaved).rotate(0, keys, by(*positions))
    for pair in range(pairs):
        x, y = (2 * pair, 2 * pair + 1) if is_interleaved else (pair, pair + pairs)
        angle = by(*positions).double()[:, None, None] * frequencies[pair]
        expected = torch.complex(keys[..., x], keys[..., y]) * torch.exp(1j * angle)
        assert torch.allclose(torch.complex(turned[..., x], turned[..., y]), expected, atol=1e-12)
    assert torch.equal(turned[..., 2 * pairs :], keys[..., 2 * pairs :])


def test_turns_add_up_and_keep_lengths() -> None:
    rotary = Rotary((tuple(10000 ** -(pair / 32) for pair in range(32)),), (0,))
    keys = torch.randn(2, 2, 3, 64)
    far = rotary.rotate(0, keys, by(30_000, 7))
    assert (far.norm(dim=-1) - keys.norm(dim=-1)).abs().max() < 1e-5
    assert (rotary.rotate(0, rotary.rotate(0, keys, by(29_000, 3)), by(1000, 4)) - far).abs().max() < 1e-5
    assert (rotary.rotate(0, far, by(-30_000, -7)) - keys).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    rotary = Rotary(((1.0, 0.3),), (0,))
    keys = torch.randn(1, 2, 3, 5).to(dtype)
    turned, exact = rotary.rotate(0, keys, by(17)), rotary.rotate(0, keys.double(), by(17))
    assert turned.dtype == dtype
    assert (turned.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize(
    ("layer", "keys", "positions", "message"),
    [
        (1, torch.zeros(2, 1, 3, 4), by(1, 2), r"layer must be in 0\.\.0, got 1"),
        (-1, torch.zeros(2, 1, 3, 4), by(1, 2), r"layer must be in 0\.\.0, got -1"),
        (0, torch.zeros(2, 3, 4), by(1, 2), r"keys must be \(B, G, P, D\).*got \(2, 3, 4\)"),
        (0, torch.zeros(2, 1, 3, 4), by(1), r"by int64 \(B,\) or \(B, P\), got \(2, 1, 3, 4\) and torch.int64 \(1,\)"),
        (0, torch.zeros(2, 1, 3, 4), torch.zeros(2), r"by int64 \(B,\) or \(B, P\).*torch.float32 \(2,\)"),
        (0, torch.zeros(2, 1, 3, 3), by(1, 2), r"keys must have a head size of at least 4, the number of .* got 3$"),
    ],
)
def test_what_does_not_fit_is_refused(layer: int, keys: Tensor, positions: Tensor, message: str) -> None:
    with pytest.raises(GistError, match=message):
        Rotary(((1.0, 0.1),), (0,)).rotate(layer, keys, positions)


# -- as JSON -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "smollm3", "cohere2", "gpt_neox"])
def test_json_keeps_every_bit(name: str) -> None:
    rotary = rotary_of(tiny.patched(name)[0])
    assert rotary is not None
    assert Rotary.from_dict(json.loads(json.dumps(rotary.to_dict()))) == rotary


WHOLE: dict[str, Any] = {"frequencies": [[1.0, 0.5]], "layers": [0, None], "is_interleaved": False}


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        {},
        {**WHOLE, "frequencies": None},
        {**WHOLE, "frequencies": [None]},
        {**WHOLE, "frequencies": [["1"]]},
        {**WHOLE, "frequencies": [[float("nan")]]},
        {**WHOLE, "frequencies": [[float("inf")]]},
        {**WHOLE, "frequencies": [[10**400]]},
        {**WHOLE, "layers": 0},
        {**WHOLE, "layers": [1]},
        {**WHOLE, "layers": [-1]},
        {**WHOLE, "layers": [True]},
        {**WHOLE, "layers": [0.0]},
        {**WHOLE, "is_interleaved": 1},
    ],
    ids=str,
)
def test_what_is_no_rotary_is_refused(found: Any) -> None:
    with pytest.raises(ValueError, match=r"^rotary "):
        Rotary.from_dict(found)


# -- read off models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "layers", "num_pairs", "is_interleaved"),
    [
        ("llama", {}, (0, 0, 0), (4,), False),
        ("gemma3_text", {}, (1, 0, 1), (4, 4), False),  # full, then sliding
        ("smollm3", {}, (0, None, 0), (4,), False),
        ("cohere2", {}, (0, None, 0), (4,), True),
        ("gpt_neox", {}, (0, 0, 0), (2,), False),
        ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, (0, 0, 0), (2,), False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rotary_of(
    name: str, changes: dict[str, Any], layers: tuple, num_pairs: tuple[int, ...], is_interleaved: bool
) -> None:
    rotary = rotary_of(tiny.patched(name, **changes)[0])
    assert rotary is not None
    assert rotary.layers == layers
    assert tuple(len(values) for values in rotary.frequencies) == num_pairs
    assert rotary.is_interleaved == is_interleaved


def test_frequencies_are_the_published_ones() -> None:
    """theta_i = 10000^(-2 (i - 1) / d) (arXiv 2104.09864, section 3.2.2)."""
    rotary = rotary_of(tiny.patched("llama")[0])
    assert rotary is not None
    assert rotary.frequencies[0] == pytest.approx([1.0, 0.1, 0.01, 0.001])


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_frequencies_do_not_depend_on_what_ran_last(name: str) -> None:
    """The frequencies are right even after a text longer than the length at which they change."""
    model, _ = tiny.patched(name)
    before = rotary_of(model)
    model(torch.arange(200)[None] % 64)
    assert rotary_of(model) == before


@pytest.mark.parametrize("name", tiny.ENCODER_DECODERS)
def test_an_encoder_decoder_rotates_nothing(name: str) -> None:
    assert rotary_of(tiny.patched(name)[0]) is None


def test_frequencies_that_are_not_where_they_are_looked_for() -> None:
    """Prompts of such a model can be compressed, but not chained."""
    model, _ = tiny.patched("llama")
    assert rotary_of(model) is not None
    del model.base_model.rotary_emb.inv_freq
    assert rotary_of(model) is None
    del model.base_model.rotary_emb
    assert rotary_of(model) is None


def test_without_a_check_it_is_not_known() -> None:
    model, _ = tiny.patched("llama")
    assert rotary_of(model) is not None
    del model.config.gist["checked"]
    assert rotary_of(model) is None

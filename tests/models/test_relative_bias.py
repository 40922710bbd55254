"""Under an interval mask, T5's relative bias is a table: outputs, gradients and training equal those with the model's
own tensor, but no tensor is as large as the scores. Also, what all layers derive from a mask is derived once.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

import gisting
from gisting._compat import cache_argument
from gisting.attention import memo
from gisting.attention.relative import dense_bias
from gisting.errors import GistError
from gisting.models import registry, relative_bias
from gisting.models.relative_bias import bias_table, table_width
from gisting.padding import pad_rows
from gisting.visibility import ENCODER_CONDITIONS, Visibility, causal, gist
from tests import tiny
from tests.models.test_families import Result, assert_as_good_as, few_by_default, result_of, seen_by_someone
from tests.models.test_patch import assert_same_state, full_text, gradients, interval_call, state_of

every_kind = pytest.mark.parametrize("name", ["t5", "mt5", "umt5"])
PUBLISHED = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
IGNORED = -100


def self_attention(model: PreTrainedModel, stack: str, block: int = 0) -> Any:
    return getattr(model, stack).block[block].layer[0].SelfAttention


# -- the table ---------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize(
    ("buckets", "max_distance", "encoder", "decoder"),
    [
        # 16 buckets each way: 0..7 exact, then 8 (128/8)^(7/8) = 90.5; or 32 one way: 16 (128/16)^(15/16) = 112.4.
        (32, 128, 91, 113),
        (64, 256, 216, 240),
        (8, 20, 7, 14),
        # 4 each way: 2 (32/2)^(1/2) = 8, a distance at which the logarithm is exact.
        (8, 32, 8, 20),
        (4, 4, 1, 3),
        # No table: 16 exact buckets one way, and a maximal distance below them.
        (32, 10, 10, None),
        (32, 5, None, None),
    ],
)
def test_width(name: str, buckets: int, max_distance: int, encoder: int | None, decoder: int | None) -> None:
    model = tiny.model(
        name, relative_attention_num_buckets=buckets, relative_attention_max_distance=max_distance, num_layers=1
    )
    assert table_width(self_attention(model, "encoder")) == encoder
    assert table_width(self_attention(model, "decoder")) == decoder


@every_kind
@pytest.mark.parametrize(
    ("stack", "settings", "buckets"),
    [
        # distance                -1 0 1
        ("encoder", (4, 4), [     1, 0, 3]),
        # distance          -3 -2 -1 0 1  2  3      a row of a decoder sees nothing after it
        ("decoder", (4, 4), [3, 2, 1, 0, 0, 0, 0]),
        # distance           -7 -6 ... -2 -1 0 1  2  ...         7
        ("encoder", (8, 20), [3, 2, 2, 2, 2, 2, 1, 0, 5, 6, 6, 6, 6, 6, 7]),
    ],
    ids=["encoder", "decoder", "encoder-logarithmic"],
)  # fmt: skip
@torch.no_grad()
def test_table_by_eye(name: str, stack: str, settings: tuple[int, int], buckets: list[int]) -> None:
    """The embedding of a bucket is its number, and ten times its number for the second head."""
    count, max_distance = settings
    model = tiny.model(name, relative_attention_num_buckets=count, relative_attention_max_distance=max_distance)
    attention = self_attention(model, stack)
    weight = attention.relative_attention_bias.weight
    weight.copy_(torch.arange(count)[:, None] * torch.tensor([1.0, 10.0, 0.0, -1.0]))
    width = table_width(attention)
    assert width is not None
    table = bias_table(attention, width, torch.device("cpu"))
    assert table.shape == (4, 2 * width + 1)
    assert table[0].tolist() == buckets
    assert table[1].tolist() == [10 * bucket for bucket in buckets]


@every_kind
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("settings", [{}, PUBLISHED], ids=["8-buckets", "32-buckets"])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (2, 2), (7, 7), (27, 27), (300, 300), (1, 5), (1, 300), (111, 300)])
@torch.no_grad()
def test_dense_table_is_the_model_s_own_bias(
    name: str, stack: str, settings: dict[str, int], rows: int, keys: int
) -> None:
    attention = self_attention(tiny.model(name, num_layers=1, num_decoder_layers=1, **settings), stack)
    width = table_width(attention)
    assert width is not None
    table = bias_table(attention, width, torch.device("cpu"))
    stock = attention.compute_bias(rows, keys, past_seen_tokens=keys - rows)
    assert torch.equal(dense_bias(table, rows, keys), stock)


@every_kind
def test_a_narrower_table_would_be_wrong(name: str) -> None:
    for stack in ("encoder", "decoder"):
        attention = self_attention(tiny.model(name, **PUBLISHED), stack)
        width = table_width(attention)
        assert width is not None
        narrow = bias_table(attention, width - 1, torch.device("cpu"))
        assert not torch.equal(dense_bias(narrow, 300, 300), attention.compute_bias(300, 300))


# -- a model with tables is the stock model ----------------------------------------------------------------------------


class Batch(NamedTuple):
    """A ragged batch in which source and target both have an interval mask."""

    ids: Tensor
    is_token: Tensor
    source: Visibility
    targets: Tensor
    is_target: Tensor
    target: Visibility

    def call(self) -> dict[str, Any]:
        return {
            "input_ids": self.ids,
            "attention_mask": self.source.as_attention_mask(),
            "decoder_input_ids": self.targets,
            "decoder_attention_mask": self.target.as_attention_mask(),
            "use_cache": False,
        }

    def labels(self) -> Tensor:
        return self.targets.roll(-1, 1).masked_fill(~self.is_target, IGNORED)


#             prompt  k  input  answer     tokens; source and answer are longer than the width of any table
ROWS: tuple = ((5, 3, 7, 19), (19, 1, 2, 4), (1, 4, 13, 1), (11, 2, 1, 8))


def batch(condition: str, left: bool = False) -> Batch:
    tokenizer = tiny.tokenizer("t5")
    encodings = tokenizer.encode_batch(
        [tiny.words(prompt, 1) for prompt, _, _, _ in ROWS],
        [tiny.words(count, 2) for _, _, count, _ in ROWS],
        num_gist_tokens=[k for _, k, _, _ in ROWS],
    )
    ids, is_token = pad_rows([encoding.input_ids for encoding in encodings], tokenizer.pad_token_id, left=left)
    source = ENCODER_CONDITIONS[condition](ids == tokenizer.gist_token_id, is_token)
    generator = torch.Generator().manual_seed(6)
    answers = [torch.randint(4, 60, (count,), generator=generator).tolist() for _, _, _, count in ROWS]
    targets, is_target = pad_rows(answers, tokenizer.pad_token_id, left=left)
    return Batch(ids, is_token, source, targets, is_target, causal(is_target))


def additive(visibility: Visibility, is_token: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask in the form that eager attention adds."""
    dense = seen_by_someone(visibility.to_dense(), is_token)
    return torch.zeros(dense.shape, dtype=dtype).masked_fill(~dense, torch.finfo(dtype).min)[:, None]


def stock_logits(stock: PreTrainedModel, given: Batch) -> Tensor:
    """The logits of an unpatched model with dense masks."""
    states = stock.get_encoder()(given.ids, attention_mask=additive(given.source, given.is_token, stock.dtype))
    return stock(
        encoder_outputs=states,
        attention_mask=given.source.survivors().long(),
        decoder_input_ids=given.targets,
        decoder_attention_mask=additive(given.target, given.is_target, stock.dtype),
        use_cache=False,
    ).logits


@every_kind
@pytest.mark.parametrize("condition", ["gist", "positive"])
@pytest.mark.parametrize("left", [True, False], ids=["pad-left", "pad-right"])
def test_outputs_and_gradients_are_those_of_stock_eager(name: str, condition: str, left: bool) -> None:
    model, _ = tiny.patched(name)
    given = batch(condition, left)
    found = result_of(model, model(**given.call()).logits, given.is_target)
    biases = [key for key in found.gradients if key.endswith("relative_attention_bias.weight")]
    assert len(biases) == (5 if name == "umt5" else 2)
    assert all(found.gradients[key].abs().max() > 0 for key in biases)
    stock = tiny.stock_twin(name, model, attn_implementation="eager")
    results: list[Result] = []
    for dtype in (torch.float32, torch.float64):
        stock = stock.to(dtype)
        results.append(result_of(stock, stock_logits(stock, given), given.is_target))
    assert_as_good_as(found, *results)


def loss_of(logits: Tensor, given: Batch) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), given.labels().flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("name", ["t5", pytest.param("mt5", marks=pytest.mark.slow), "umt5"])
@pytest.mark.parametrize(("optimizer", "rate"), [("SGD", 0.01), ("AdamW", 3e-4)], ids=["SGD", "AdamW"])
def test_training_is_that_of_stock_eager(name: str, optimizer: str, rate: float) -> None:
    """Train 20 steps in float64: only the order of sums differs (measured: 4e-16 of the loss).

    Weights have the usual size, and steps are small. With weights five times as large, T5's unscaled scores make
    training chaotic: changing a stock model's weights by 2^-52 gives a different model after ten steps.
    """
    model, _ = tiny.patched(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(5)
    stock = tiny.stock_twin(name, model, attn_implementation="eager").double()
    model.double()
    biases = [key for key, _ in model.named_parameters() if key.endswith("relative_attention_bias.weight")]
    before = {key: model.state_dict()[key].clone() for key in biases}
    given = batch("gist")
    losses: list[list[float]] = []
    for which, logits_of in (
        (model, lambda: model(**given.call()).logits),
        (stock, lambda: stock_logits(stock, given)),
    ):
        stepper = getattr(torch.optim, optimizer)(which.parameters(), lr=rate)
        losses.append([])
        for _ in range(20):
            stepper.zero_grad()
            loss = loss_of(logits_of(), given)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(which.parameters(), 1.0)
            stepper.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.05
    assert losses[0] == pytest.approx(losses[1], rel=1e-12, abs=0)
    trained = dict(stock.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter, trained[key], rtol=0, atol=1e-12, msg=lambda text, key=key: f"{key}{text}"
        )
    assert not any(torch.equal(trained[key], tensor) for key, tensor in before.items())


@every_kind
@torch.no_grad()
def test_decoder_goes_on_from_a_cache(name: str) -> None:
    """When rows are the last of the keys, token by token equals one pass."""
    model, _ = tiny.patched(name)
    model.double()
    given = batch("gist", left=True)
    wanted = model(**given.call()).logits
    states = model.get_encoder()(given.ids, attention_mask=given.source.as_attention_mask())
    past, found = None, []
    for row in range(given.targets.shape[1]):
        seen = Visibility(given.target.first[:, : row + 1], given.target.end[:, : row + 1])
        out = model(
            encoder_outputs=states,
            attention_mask=given.source.as_attention_mask(),
            decoder_input_ids=given.targets[:, row : row + 1],
            decoder_attention_mask=seen.as_attention_mask(),
            **{cache_argument(): past},
            use_cache=True,
        )
        past = out[cache_argument()]
        found.append(out.logits)
    logits = torch.cat(found, 1)
    torch.testing.assert_close(logits[given.is_target], wanted[given.is_target], rtol=1e-9, atol=1e-9)


# -- nothing as large as the scores ------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Record the shape of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(tensor.shape) for tensor in tree_leaves(out) if torch.is_tensor(tensor)}
        return out


@every_kind
def test_no_bias_as_large_as_the_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny.patched(name)
    given = batch("gist")
    rows, keys = given.targets.shape[1], given.ids.shape[1]
    assert rows != keys
    asked: list[tuple[tuple[int, ...] | None, ...]] = []
    lengths: list[int] = []
    kind = type(self_attention(model, "encoder"))
    stock = kind.compute_bias

    def compute_bias(module: Any, query_length: int, *args: Any, **kwargs: Any) -> Tensor:
        lengths.append(query_length)
        return stock(module, query_length, *args, **kwargs)

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, **kwargs: Any) -> Tensor:
        asked.append(
            tuple(None if kwargs[bias] is None else tuple(kwargs[bias].shape) for bias in ("bias", "relative_bias"))
        )
        return q * kwargs["scale"]

    monkeypatch.setattr(kind, "compute_bias", compute_bias)
    monkeypatch.setattr(registry, "interval_attention", attention)
    with Shapes() as shapes:
        model(**given.call())
    in_encoder, in_decoder, in_cross = (None, (4, 15)), (None, (4, 29)), (None, None)
    assert asked == [in_encoder] * 3 + [in_decoder, in_cross] * 2
    assert lengths == [1] * (5 if name == "umt5" else 2), "a table is one row of distances"
    large = {shape for shape in shapes.seen if shape[-2:] in {(keys, keys), (rows, rows), (rows, keys)}}
    # UMT5 makes zeros for its cross-attention, and nothing can be passed instead.
    assert large == ({(1, 4, rows, keys)} if name == "umt5" else set())


@every_kind
@torch.no_grad()
def test_buckets_that_never_rest_keep_the_large_bias(name: str) -> None:
    settings: dict[str, Any] = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 10}
    model, _ = tiny.patched(name, **settings)
    model.double()
    given = batch("gist")
    stock = tiny.stock_twin(name, model, **settings, attn_implementation="eager").double()
    wanted = stock_logits(stock, given)
    found = model(**given.call()).logits
    torch.testing.assert_close(found[given.is_target], wanted[given.is_target], rtol=1e-9, atol=1e-9)


# -- what stays as it was ----------------------------------------------------------------------------------------------


def ordinary_call() -> dict[str, Any]:
    given = batch("positive")
    ids = given.ids.clamp(max=60)
    return {
        "input_ids": ids,
        "attention_mask": given.is_token.long(),
        "decoder_input_ids": given.targets,
        "decoder_attention_mask": given.is_target.long(),
    }


def attributes_of_attention(model: PreTrainedModel) -> list[set[str]]:
    return [set(vars(module)) for module in model.modules() if hasattr(module, "has_relative_attention_bias")]


@every_kind
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_ordinary_masks_to_the_bit(name: str, implementation: str) -> None:
    """Outputs and gradients are the same before and after calls with an interval mask, one of which fails."""
    model = tiny.model(name, attn_implementation=implementation)
    vocabulary, call, interval = len(tiny.VOCABULARY), ordinary_call(), batch("gist").call()

    def bits() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logits = model(**call).logits[..., :vocabulary]
        logits.square().sum().backward()
        found = {key: tensor.grad.clone() for key, tensor in model.named_parameters() if tensor.grad is not None}
        return logits.detach(), found

    wanted_logits, wanted = bits()
    gisting.patch(model, tiny.tokenizer(name))
    for attention_mask in (None, interval["attention_mask"], interval["attention_mask"][..., 1:]):
        if attention_mask is not None:
            # A mask with one key too few is refused in the middle of the first attention.
            is_short = attention_mask.shape != interval["attention_mask"].shape
            with pytest.raises(GistError, match=r"^visibility must be for") if is_short else contextlib.nullcontext():
                model(**{**interval, "attention_mask": attention_mask})
        logits, found = bits()
        assert torch.equal(logits, wanted_logits)
        for key, gradient in wanted.items():
            # The head and the embeddings have one row more.
            assert torch.equal(found[key][: len(gradient)], gradient), key


@every_kind
def test_unpatch_leaves_nothing(name: str) -> None:
    model = tiny.model(name)
    state, attributes = state_of(model), attributes_of_attention(model)
    gisting.patch(model, tiny.tokenizer(name))
    assert state_of(model)["hooks"] == 1 + (5 if name == "umt5" else 7)
    given = batch("gist").call()
    model(**given)
    assert attributes_of_attention(model) == attributes
    with pytest.raises(GistError, match=r"^visibility must be for"):
        model(**{**given, "attention_mask": given["attention_mask"][..., 1:]})
    gisting.unpatch(model)
    assert_same_state(state_of(model), state)
    assert attributes_of_attention(model) == attributes
    assert not any(module._forward_hooks for module in model.modules())


def _saved(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_kind
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved],  # noqa: S301
    ids=["deepcopy", "pickle", "torch-save"],
)
def test_copies_have_tables_of_their_own(name: str, copied: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    model, _ = tiny.patched(name)
    call = batch("gist").call()
    wanted = model(**call).logits
    twin = copied(model)
    assert torch.equal(twin(**call).logits, wanted)
    with torch.no_grad():
        for stack in ("encoder", "decoder"):
            self_attention(twin, stack).relative_attention_bias.weight.zero_()
    assert not torch.equal(twin(**call).logits, wanted)
    assert torch.equal(model(**call).logits, wanted)
    gisting.unpatch(twin)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in twin.modules())
    assert torch.equal(model(**call).logits, wanted)


@every_kind
@torch.no_grad()
def test_saved_checkpoint(name: str, tmp_path: Any) -> None:
    model, tokenizer = tiny.patched(name)
    call = batch("gist").call()
    wanted = model(**call).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(gisting.patch(loaded.eval(), tokenizer)(**call).logits, wanted)


@torch.no_grad()
def test_a_table_for_an_ordinary_mask_is_made_dense() -> None:
    """Another thread's call with an interval mask may come between hook and forward of UMT5."""
    model, _ = tiny.patched("umt5")
    call = ordinary_call()
    wanted = model(**call).logits
    for stack in ("encoder", "decoder"):
        attention = self_attention(model, stack)
        interval = batch("gist").source.as_attention_mask()

        def race(module: Any, args: Any, mask: Tensor = interval) -> None:
            hook = next(hook for hook in module._forward_pre_hooks.values() if hasattr(hook, "keywords"))
            hook(module, (), {"attention_mask": mask})

        attention.register_forward_pre_hook(race)
    assert torch.equal(model(**call).logits, wanted)


# -- training and compiling --------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing(name: str, use_reentrant: bool, dropout: float) -> None:
    model, _ = tiny.patched(name, dropout_rate=dropout)
    model.double().train()
    call = batch("gist").call()

    def run() -> dict[str, Tensor]:
        torch.manual_seed(8)
        return gradients(model, call)

    wanted = run()
    # Renamed in 5.2x; goes when the floor knows the new name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    found = run()
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        # As in tests/models/test_patch.py: one bias sums the gradients of all layers in a different order.
        atol = 1e-11 * gradient.abs().max().item()
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


@every_kind
def test_dropout(name: str) -> None:
    model, _ = tiny.patched(name, dropout_rate=0.3)
    call = batch("gist").call()
    without = gradients(model, call)
    model.train()
    torch.manual_seed(1)
    one = gradients(model, call)
    other = gradients(model, call)
    for key, gradient in without.items():
        if key.endswith("relative_attention_bias.weight"):
            assert one[key].isfinite().all()
            assert one[key].abs().max() > 0
            assert not torch.equal(one[key], other[key])
            assert not torch.equal(one[key], gradient)


@every_kind
def test_autocast(name: str) -> None:
    model, _ = tiny.patched(name)
    given = batch("gist")
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model(**given.call()).logits, given)
    loss.backward()
    for stack in ("encoder", "decoder"):
        gradient = self_attention(model, stack).relative_attention_bias.weight.grad
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_compiled_is_eager(name: str) -> None:
    """The model compiles to one graph, which is used again: the hooks leave nothing that guards would see change."""
    model, _ = tiny.patched(name)
    call = batch("gist").call()
    wanted = model(**call).logits
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(**call).logits, wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    ordinary = ordinary_call()
    assert torch.equal(compiled(**ordinary).logits, model(**ordinary).logits)


# -- what is derived from a mask, once ---------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Visibility]:
    """Record what an implementation that plans from intervals would have to plan."""
    found: list[Visibility] = []
    right = registry.interval_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, **kwargs: Any) -> Tensor:
        memo.remembered(visibility, "plan", lambda: found.append(copy.deepcopy(visibility)))
        return right(q, k, v, visibility, **kwargs)

    monkeypatch.setattr(registry, "interval_attention", attention)
    return found


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        pytest.param("llama", 1, id="llama"),
        pytest.param("gemma3_text", 2, id="gemma3-two-kinds-of-layers"),
        pytest.param("t5", 2, id="t5-encoder-and-cross"),
        pytest.param("umt5", 2, id="umt5-encoder-and-cross"),
    ],
)
def test_intervals_are_planned_once_for_a_batch(name: str, kinds: int, builds: list[Visibility]) -> None:
    model, _ = tiny.patched(name)
    assert model.config.num_hidden_layers == 3
    is_encoder_decoder = name in tiny.ENCODER_DECODERS
    call = interval_call(name, *full_text(is_encoder_decoder))
    model(**call).logits.sum().backward()
    assert len(builds) == kinds
    model(**call)
    assert len(builds) == kinds, "the same tensor once more"
    model(**{**call, "attention_mask": call["attention_mask"].clone()})
    assert len(builds) == 2 * kinds, "another tensor"


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "t5"])
@torch.no_grad()
def test_a_mask_that_was_written_to_is_read_again(name: str, builds: list[Visibility]) -> None:
    model, _ = tiny.patched(name)
    ids, visibility = full_text(name == "t5")
    call = interval_call(name, ids, visibility)
    mask = call["attention_mask"]
    model(**call)
    # No prompt this time.
    no_prompt = torch.ones_like(ids).bool()
    no_prompt[:, :7] = False
    other = interval_call(name, ids, (ENCODER_CONDITIONS["gist"] if name == "t5" else gist)(ids == 64, no_prompt))
    wanted = model(**{**call, "attention_mask": other["attention_mask"]}).logits
    built = len(builds)
    mask.copy_(other["attention_mask"])
    assert torch.equal(model(**call).logits, wanted)
    assert len(builds) == built + built // 2
    assert torch.equal(builds[-1].first, builds[built - 1].first)
    assert torch.equal(builds[-1].end, builds[built - 1].end)


@pytest.mark.parametrize("name", few_by_default(["llama", "gemma3_text", "t5", "umt5"], ["llama", "t5"]))
def test_what_is_remembered_goes_with_the_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny.patched(name)
    gc.collect()
    before = len(memo._MEMORY)
    held: list[weakref.ref] = []
    right = registry.interval_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, **kwargs: Any) -> Tensor:
        memo.remembered(visibility, "plan", lambda: visibility.end - visibility.first)
        held.extend(map(weakref.ref, (visibility, visibility.first, visibility.end)))
        return right(q, k, v, visibility, **kwargs)

    monkeypatch.setattr(registry, "interval_attention", attention)
    call = interval_call(name, *full_text(name in tiny.ENCODER_DECODERS))
    held.append(weakref.ref(call["attention_mask"]))
    model(**call).logits.sum().backward()
    assert len(memo._MEMORY) > before
    assert all(reference() is not None for reference in held)
    del call
    gc.collect()
    assert [reference() for reference in held if reference() is not None] == []
    assert len(memo._MEMORY) == before


def test_inference_mode_remembers_nothing(builds: list[Visibility]) -> None:
    """Tensors made in inference mode could not be used in training afterwards."""
    model, _ = tiny.patched("llama")
    call = interval_call("llama", *full_text())
    with torch.inference_mode():
        wanted = model(**call).logits
    assert len(builds) == 3
    assert not call["attention_mask"].is_inference()
    model(**call).logits.sum().backward()
    assert len(builds) == 4
    assert not builds[-1].first.is_inference()
    with torch.inference_mode():
        inner = {key: tensor.clone() for key, tensor in call.items()}
        assert torch.equal(model(**inner).logits, wanted)
        inner["attention_mask"].copy_(gist(torch.zeros(2, 14).bool()).as_attention_mask())
        assert not torch.equal(model(**inner).logits, wanted)


# -- tests of the tests ------------------------------------------------------------------------------------------------


def _one_too_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    right = relative_bias.bias_table
    monkeypatch.setattr(
        relative_bias, "bias_table", lambda attention, width, device: right(attention, width - 1, device)
    )


def _mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    right = relative_bias.bias_table
    monkeypatch.setattr(relative_bias, "bias_table", lambda *args: right(*args).flip(-1))


def _without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = relative_bias.bias_table
    monkeypatch.setattr(relative_bias, "bias_table", lambda *args: right(*args).detach())


@every_kind
@pytest.mark.parametrize("plant", [_one_too_narrow, _mirrored, _without_gradient])
def test_a_planted_bug_is_found(
    name: str, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        test_outputs_and_gradients_are_those_of_stock_eager(name, "positive", left=False)

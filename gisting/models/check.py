"""Try on a loaded model whether gists are exact in it, with a few forward passes over a dozen tokens.

Place in the flow: before ``patch``, which refuses what fails; ``gisting doctor`` shows it. Knows no family: each
comparison runs the model itself in two ways that must agree, with a bound for rounding. What so few tokens cannot show
(chunked attention, frequencies that change with the length) ``registry.family_of`` reads from the config.
"""

# Over 600 lines because the runs of decoders and encoder-decoders share their ids, bounds and helpers.

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from gisting._compat import cache_argument, library_versions
from gisting._version import __version__
from gisting.cache import CacheOrigin, GistCache
from gisting.errors import GistError, UnsupportedModelError
from gisting.models import decoder, encoder_decoder, relative_bias
from gisting.models.fingerprint import lasting_config
from gisting.models.mode import evaluating
from gisting.models.registry import (
    attention_name,
    base_name,
    family_of,
    position_limit,
    register_attention,
    sliding_windows,
)
from gisting.models.rotary import layer_frequencies
from gisting.models.stacks import attention_of, set_attention, stacks
from gisting.models.state import is_patched
from gisting.models.weights import input_weight, is_quantised, keep_form, row_tensors
from gisting.padding import pad_rows
from gisting.rotary import Rotary
from gisting.tokens import GistEncoding
from gisting.visibility import Visibility, bidirectional, causal, encoder_gist, gist

__all__ = ["Comparison", "ModelCheck", "check_model", "kept_proof", "prove"]

# The rows of the batch: numbers of prompt tokens, gist tokens and tokens after them. Ragged in every part, the first
# row the longest. On a CPU the check takes as long as these tokens do, in about ten passes.
#       prompt  k  rest
_ROWS = ((6, 2, 4), (3, 1, 5))
# A window that hides something in a sequence of a dozen tokens.
_WINDOW = 4
# How many tokens further the second run of the positions is, at most. In half precision, the effect of a scale that
# grows with the position must exceed more rounding, and angles at float32 precision matter less.
_SHIFT, _SHIFT_IN_HALF = 1_000, 100_000
# The columns of text without gist tokens; the second row begins with padding.
_ORDINARY = slice(1, 7)
# How many tokens a decoder reads behind an encoder, and how far padding moves what the encoder reads.
_TARGETS, _PADDING = 3, 5
_SEED = 20

# Bounds are in units of the largest value that is compared. How much one rounding of the embeddings changes a result is
# measured on the model; attention rounds several times in each layer, in another order.
_ROUNDINGS = 8
_CAPTURING = "_output_capturing_hooks_installed"
_RECURRENT = r"mamba|recurrent|rwkv|deltanet|linearattention|lightning|xlstm|shortconv"


@dataclass(frozen=True)
class Comparison:
    """Two runs of a model that must agree.

    Args:
        name: what is checked, a word or two.
        compared: what was compared, in words.
        error: the largest difference, in units of the largest value compared; None if a run failed or gave values that
            are not finite.
        bound: the largest error that rounding explains, in the same units.
        problem: why it failed, in words; empty if it passed.
    """

    name: str
    compared: str
    error: float | None
    bound: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the runs agree."""
        return not self.problem

    def __str__(self) -> str:
        """Return one line: the verdict, both numbers and what was compared."""
        if self.error is None:
            return f"{self.name} failed, {self.compared}: {self.problem}"
        verdict = "passed" if self.passed else "failed"
        likely = "" if self.passed else f"; likely because {self.problem}"
        numbers = f"largest difference {self.error:.1e}, bound {self.bound:.1e}"
        return f"{self.name} {verdict}, {self.compared}: {numbers}{likely}"


@dataclass(frozen=True)
class ModelCheck:
    """What :func:`check_model` found.

    Args:
        model_type: as the config declares it.
        comparisons: one for each property, those that passed too.
        skipped: why nothing could be run, in words; empty if the model was run.
        is_interleaved: whether the two numbers of a key that are rotated together are neighbours; None if keys are not
            rotated as in RoPE (arXiv 2104.09864), so that gists cannot be chained.
        rotated: for each layer, whether its keys are rotated; None likewise.
    """

    model_type: str
    comparisons: tuple[Comparison, ...] = ()
    skipped: str = ""
    is_interleaved: bool | None = None
    rotated: tuple[bool, ...] | None = None

    @property
    def passed(self) -> bool:
        """Whether gists are exact in the model. False if nothing could be run."""
        return bool(self.comparisons) and all(one.passed for one in self.comparisons)

    @property
    def failed(self) -> Comparison | None:
        """The first comparison that failed, or None."""
        return next((one for one in self.comparisons if not one.passed), None)

    def __str__(self) -> str:
        """Return a line for each comparison."""
        if self.skipped:
            return f"{self.model_type}: not checked, {self.skipped}"
        head = f"{self.model_type}: {'gists are exact' if self.passed else 'gists would be wrong'}"
        return "\n".join([head, *(f"  {one}" for one in self.comparisons)])


def check_model(model: PreTrainedModel) -> ModelCheck:
    """Try whether gists are exact in ``model``: run a dozen random tokens in two ways that must agree, several times.

    A decoder is run on two short rows of prompt, gist and rest, and must give the same

    - *mask*: logits under the gist mask through interval attention, and through the model's own eager attention with
      the same mask as a matrix;
    - *window*: logits under its own sliding windows, if it has any, made shorter for the time of the comparison;
    - *positions*: logits wherever the positions start, below zero included, where the tokens of a prompt are;
    - *cache*: logits of the next two tokens from the cached gists, in one ragged batch, and from the full text;
    - *gradient*: gradients of the gists' keys and values, in every layer, as through its own eager attention;
    - *ordinary*: logits of text without gist tokens, bit by bit as before it is patched.

    An encoder-decoder is compared in the same way, its positions by padding in front.

    The weights are used as they are, so bounds for bfloat16 are wider than for float32. The model is left as it was.

    Args:
        model: a causal or encoder-decoder language model with its weights, patched or not.

    Returns:
        What was compared, with the largest error and its bound; or why the model was not run.

    Raises:
        UnsupportedModelError: the config already rules the model out; the message says why.
        GistError: ``model`` is not a transformers model, or there is not enough memory to run it.
    """
    if not isinstance(model, PreTrainedModel):
        raise GistError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    family = family_of(model.config)
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language model head; load it with AutoModelForCausalLM or "
            "AutoModelForSeq2SeqLM"
        )
    rows, head = input_weight(model).shape[0], getattr(model.get_output_embeddings(), "out_features", None)
    if head is not None and head != rows:
        raise UnsupportedModelError(
            f"{family.model_type} cannot be gisted: its input embedding has {rows} rows and its head {head}, so no id "
            "can be the gist token's in both"
        )
    unreadable = _why_unreadable(model)
    if unreadable:
        return ModelCheck(family.model_type, skipped=unreadable)
    if any(type(table) is not Tensor or not table.is_floating_point() for table in row_tensors(model)):
        raise UnsupportedModelError(
            f"{family.model_type} cannot be gisted: its embeddings or its head are quantised, so no row can be added "
            "for the gist token; quantise the other layers alone"
        )
    keep_form(model)
    register_attention()
    fixed = [stack for _, stack in stacks(model) if not stack._can_set_attn_implementation()]
    if fixed:
        raise UnsupportedModelError(
            f"{family.model_type} cannot be gisted: {type(fixed[0]).__name__} computes its attention without "
            "transformers' attention interface, so no mask of intervals reaches it"
        )
    with _as_it_was(model):
        return (_EncoderDecoder if family.is_encoder_decoder else _Decoder)(model).run()


def prove(model: PreTrainedModel) -> dict[str, Any] | None:
    """Return what ``config.gist`` keeps of the check of ``model``, without running it again if the result is known.

    A check is known if ``config.gist`` has it, for this configuration and these versions of gisting, torch and
    transformers, or if this process has checked a model with the same configuration, dtype and modules.

    Args:
        model: as for :func:`check_model`.

    Returns:
        JSON values; None if the model could not be run (:attr:`ModelCheck.skipped`).

    Raises:
        UnsupportedModelError: the model failed; the message says which comparison, with both numbers.
    """
    kept = kept_proof(model.config)
    if kept is not None:
        return kept
    about = _about(model.config)
    structure = _structure(model)
    key = None if structure is None else (json.dumps(about), model.dtype, *attention_of(model).values(), *structure)
    if key is not None and key in _known:
        return copy.deepcopy(_known[key])
    found = check_model(model)
    if found.skipped:
        return None
    failed = found.failed
    if failed is not None:
        raise UnsupportedModelError(
            f"{found.model_type} cannot be gisted: {failed}; gisting.check_model(model) shows every comparison"
        )
    rotary = None
    if found.rotated is not None:
        rotary = {"is_interleaved": found.is_interleaved, "layers": list(found.rotated)}
    proof = {**about, "rotary": rotary}
    if key is not None:
        _known[key] = copy.deepcopy(proof)
    return proof


# Proofs of this process. Its tests, like a server, patch many models of one kind.
_known: dict[Any, dict[str, Any]] = {}


def kept_proof(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return the proof that ``config.gist`` keeps, or None if there is none for this config and these versions.

    Args:
        config: of a checkpoint that was saved patched, or any other.
    """
    kept = (getattr(config, "gist", None) or {}).get("checked")
    return kept if isinstance(kept, dict) and {**kept, **_about(config)} == kept else None


def _about(config: PreTrainedConfig) -> dict[str, str]:
    # Without the vocabulary, which patch may make one larger.
    lasting = {key: value for key, value in lasting_config(config).items() if key != "vocab_size"}
    digest = hashlib.sha256(json.dumps(lasting, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return {"config": digest, "gisting": __version__, **library_versions()}


def _structure(model: PreTrainedModel) -> list[Any] | None:
    """What runs in a forward pass: each module's class and its ``forward``.

    None if hooks, single modules or quantised weights make the difference.
    """
    if getattr(model.config, "quantization_config", None) is not None or any(
        "forward" in vars(module) or module._forward_pre_hooks or module._forward_hooks for module in model.modules()
    ):
        return None
    return [(name, type(module), type(module).forward) for name, module in model.named_modules()]


def _why_unreadable(model: PreTrainedModel) -> str:
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            owner = model.get_submodule(name.rpartition(".")[0])
            if not hasattr(owner, "_hf_hook"):
                return f"because {name} is on the meta device, without values"
        if hasattr(parameter, "device_mesh"):
            return f"because {name} is sharded over several processes"
        if parameter.is_inference():
            return f"because {name} was made in inference mode, so it has no gradients"
    return ""


@contextlib.contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Restore attention, modes and buffers after a block, in which the model is in eval mode."""
    attention = attention_of(model)
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    # transformers leaves its hooks for hidden states on a model, with a mark that they are there.
    hooks = [(module, set(module._forward_hooks)) for module in model.modules()]
    marked = {module for module, _ in hooks if _CAPTURING in vars(module)}
    has_table = is_patched(model)
    device_type = input_weight(model).device.type
    with evaluating(model), torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
        try:
            if not has_table:
                relative_bias.install(model)
            yield
        finally:
            if not has_table:
                relative_bias.uninstall(model)
            set_attention(model, attention)
            for module, held in buffers:
                module._buffers.update(held)
            for module, known in hooks:
                for number in set(module._forward_hooks) - known:
                    del module._forward_hooks[number]
                if module not in marked:
                    vars(module).pop(_CAPTURING, None)


class _Runs:
    """What the runs of decoders and encoder-decoders share: the ids that they read, and how they are compared."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.device = input_weight(model).device
        self.base = {name: base_name(found) for name, found in attention_of(model).items()}
        self.dtype = model.dtype if model.dtype.is_floating_point else torch.float32
        # Kernels of quantised layers may round to 16 bits, whatever the dtype of their input is.
        self.is_quantised = is_quantised(model)
        self.is_half = self.dtype.itemsize <= 2 or self.is_quantised
        self.eps = torch.finfo(torch.bfloat16 if self.is_half and self.dtype.itemsize > 2 else self.dtype).eps
        pad, gist_token, *others = _draw_ids(model)
        self.tokens: Any = SimpleNamespace(pad_token_id=pad, gist_token_id=gist_token)
        drawn = itertools.cycle(others)
        self.prompts: list[GistEncoding] = []
        self.rests: list[list[int]] = []
        for prompt, k, rest in _ROWS:
            ids = [next(drawn) for _ in range(prompt)] + [self.tokens.gist_token_id] * k
            self.prompts.append(GistEncoding(ids, prompt, prompt + k, prompt + k))
            self.rests.append([next(drawn) for _ in range(rest)])
        self.full = [prompt.input_ids + rest for prompt, rest in zip(self.prompts, self.rests, strict=True)]
        self.targets = torch.tensor([[next(drawn) for _ in range(_TARGETS)] for _ in _ROWS], device=self.device)
        self.ids, self.is_token = pad_rows(self.full, self.tokens.pad_token_id, left=True)
        self.is_gist = self.ids == self.tokens.gist_token_id
        # What eager attention reads in one batch: every row, row 0 from rounded embeddings, and, in half precision,
        # row 0 under a mask that hides nothing.
        self.repeated = [*range(len(_ROWS)), 0, *([0] if self.is_half else [])]
        self.rows = f"{len(_ROWS)} rows of prompt, gist and rest, {int(self.is_token.sum())} tokens"
        self.comparisons: list[Comparison] = []
        #: The largest error of the states of each layer, and of the logits, that rounding explains.
        self.bounds: list[float] = []
        self.rotation: tuple[bool, tuple[bool, ...]] | None = None

    def compare(self, name: str, compared: str, run: Callable[[], tuple[float, float, str]]) -> bool:
        """Add a comparison; ``run`` returns its error, its bound, and what a larger error means."""
        try:
            error, bound, problem = run()
        except torch.OutOfMemoryError as fault:  # says nothing about the model
            raise GistError(
                f"not enough memory to try the model ({str(fault).strip().partition(chr(10))[0]}); patch(check=False) "
                "skips the check"
            ) from fault
        except Exception as fault:  # noqa: BLE001 - whatever a model's code raises is the finding
            lines = str(fault).strip().splitlines() or [""]
            problem = f"{type(fault).__name__}: {lines[0]}"
            self.comparisons.append(Comparison(name, compared, None, 0.0, _recurrent(self.model) or problem))
            return False
        if error > bound:
            problem = _recurrent(self.model) or problem
        found = error if math.isfinite(error) else None
        self.comparisons.append(Comparison(name, compared, found, bound, problem if error > bound else ""))
        return error <= bound

    def result(self) -> ModelCheck:
        """Return all comparisons."""
        is_interleaved, rotated = self.rotation or (None, None)
        return ModelCheck(
            self.model.config.model_type, tuple(self.comparisons), is_interleaved=is_interleaved, rotated=rotated
        )

    def attend(self, kind: str) -> None:
        """Switch to ``"gist"``, the attention that reads intervals, to ``"eager"``, or to ``"base"``, as it was."""
        names = {
            name: attention_name(base) if kind == "gist" else base if kind == "base" else kind
            for name, base in self.base.items()
        }
        set_attention(self.model, names)
        for name, found in attention_of(self.model).items():
            if found != names[name]:
                raise GistError(f"{name or 'the model'} runs {found} attention and cannot be set to {names[name]}")

    def repeat(self, rows: Tensor, blind: Tensor | None = None) -> Tensor:
        """Return the rows that eager attention reads, the last one from ``blind`` if it reads it."""
        repeated = rows[self.repeated]
        if blind is not None and self.is_half:
            repeated[-1] = blind[0]
        return repeated

    def set_bounds(
        self, found: Sequence[Tensor], repeated: Sequence[Tensor], is_masked: Tensor
    ) -> tuple[float, float, str]:
        """Compare runs under the gist mask, and note how far one rounding moves the states of each layer.

        Args:
            found: states of each layer and logits, from interval attention.
            repeated: the same from eager attention, of the rows in ``self.repeated``.
            is_masked: bool ``(B, N)``, the tokens from which the mask hides something.
        """
        many = len(_ROWS)

        def at(parts: Sequence[Tensor], known: Tensor) -> list[Tensor]:
            # Logits may be at other tokens, those of a decoder.
            return [part[known] if part.shape[:2] == known.shape else part.flatten(0, 1) for part in parts]

        truth, first = at([part[:many] for part in repeated], self.is_token), [part[:1] for part in repeated]
        known = self.is_token[:1]
        rounded = at([part[many : many + 1] for part in repeated], known)
        roundings = [self.difference(one, two) for one, two in zip(rounded, at(first, known), strict=True)]
        self.bounds = [max(_ROUNDINGS * rounding, self.floor()) for rounding in roundings]
        error, bound = self.worst(at(found, self.is_token), truth)
        # In float32 this is a model whose attention adds nothing. A mask that every layer ignores fails "cache".
        if self.is_half and error <= bound:
            known = is_masked[:1]
            blind = at([part[many + 1 :] for part in repeated], known)
            if not self.exceeds(blind, at(first, known)):
                advice = "in float32, not quantised" if self.is_quantised else "in float32"
                return math.inf, bound, f"rounding hides what the mask does; load the model {advice}"
        return error, bound, _about_masks(self.model)

    def compare_gradients(
        self, found: Sequence[Tensor | None], repeated: Sequence[Tensor | None], per_layer: int
    ) -> tuple[float, float, str]:
        """Compare gradients ``(B, N, ...)`` at the gists, ``per_layer`` of them in each layer."""
        error = rounding = 0.0
        many = len(_ROWS)
        for number, (one, more) in enumerate(zip(found, repeated, strict=True)):
            missing = f"no gradient reaches the states of the gist in layer {number // per_layer}"
            if one is None or more is None:
                return math.inf, 0.0, missing
            is_gist = self.is_gist.to(one.device)
            # Of all tokens together: the gradient of one token's keys may be close to zero.
            error = max(error, self.difference(one[is_gist].flatten(), more[:many][is_gist].flatten()))
            rounded = more[many : many + 1][is_gist[:1]].flatten()
            rounding = max(rounding, self.difference(rounded, more[:1][is_gist[:1]].flatten()))
        return error, max(_ROUNDINGS * rounding, self.floor()), "a layer works on scores outside the attention function"

    def weights(self, logits: Tensor) -> Tensor:
        """A random weight for each logit, so that no gradient is small by symmetry; a repeated row has the same."""
        weights = torch.randn((len(_ROWS), *logits.shape[1:]), generator=torch.Generator().manual_seed(_SEED))
        return (weights if len(logits) == len(_ROWS) else weights[self.repeated]).to(logits.device)

    def difference(self, found: Tensor, truth: Tensor) -> float:
        """As :func:`_difference`, for this model."""
        return _difference(found, truth, self.is_half)

    def floor(self) -> float:
        """The smallest bound: a few roundings, for a model that happens to repeat itself to the bit."""
        # Rotary frequencies are float32 in float64 models too.
        return self.eps if self.is_half else 16 * torch.finfo(torch.float32).eps

    def worst(self, found: Sequence[Tensor], truth: Sequence[Tensor], more: float = 0.0) -> tuple[float, float]:
        """The error and the bound where the error is largest in units of the bound."""
        pairs = [
            (self.difference(one, two), bound + more) for one, two, bound in zip(found, truth, self.bounds, strict=True)
        ]
        return max(pairs, key=lambda pair: pair[0] / pair[1])

    def exceeds(self, found: Sequence[Tensor], truth: Sequence[Tensor]) -> bool:
        """Whether the states of some layer differ by more than rounding."""
        error, bound = self.worst(found, truth)
        return error > bound

    def as_scores(self, seen: Tensor) -> Tensor:
        """Return a mask to add to scores; a row of padding sees itself, for a row that sees nothing may be NaN."""
        seen = seen | torch.diag_embed(~self.is_token)
        return torch.zeros(seen.shape, dtype=self.dtype).masked_fill(~seen, torch.finfo(self.dtype).min)[:, None]

    def greedy(self) -> GenerationConfig:
        """Two new tokens, with what the layers make of them."""
        start = getattr(self.model.config, "decoder_start_token_id", None)
        if start is None and self.model.config.is_encoder_decoder:
            start = self.tokens.pad_token_id
        return GenerationConfig(
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            output_hidden_states=True,
            pad_token_id=self.tokens.pad_token_id,
            decoder_start_token_id=start,
            suppress_tokens=[self.tokens.gist_token_id],
        )


class _Decoder(_Runs):
    """The runs of one decoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.visibility = gist(self.is_gist, self.is_token)
        limit = position_limit(model.config)
        shift = _SHIFT_IN_HALF if self.is_half else _SHIFT
        self.shift = shift if limit is None else max(0, min(shift, limit - self.ids.shape[1]))
        #: How far below 0 the positions of a row's prompt begin; those of the gist and the rest are above.
        self.below = _ROWS[0][0]

    def run(self) -> ModelCheck:
        with _windows(self.model, 1 << 20):
            is_right = self.compare(
                "mask", f"states and logits of {self.rows}, through interval attention and with a dense mask", self.mask
            )
            is_right = is_right and self.compare(
                "gradient",
                "gradients of the gists' keys and values in every layer, in the same two runs",
                self.gradient,
            )
            is_right = is_right and self.compare(
                "positions",
                f"states and logits at positions from 0, from {self.shift} and from {-self.below}",
                self.positions,
            )
            is_right = is_right and self.compare(
                "cache", "states and logits of two new tokens, from cached gists and from the full text", self.cache
            )
        if is_right and sliding_windows(self.model.config) is not None:
            is_right = self.compare(
                "window", f"states and logits with windows of {_WINDOW} tokens, in both kinds of attention", self.window
            )
        if is_right:
            self.compare("ordinary", "logits of text without gist tokens, before and after patching", self.ordinary)
        return self.result()

    def states(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, **more: Any) -> list[Tensor]:
        """Return what each layer makes of each token, ``(B, N, d_model)``, and the logits."""
        if mask is not None:
            more["attention_mask"] = mask.to(self.device)
        if positions is not None:
            more["position_ids"] = positions.to(self.device)
        out = self.model(input_ids=ids.to(self.device), output_hidden_states=True, **more)
        return [*_layers(out.hidden_states, ids.shape), out.logits]

    # -- the comparisons -----------------------------------------------------------------------------------------------

    def mask(self) -> tuple[float, float, str]:
        positions = self._from_zero()
        self.attend("gist")
        intervals = self.visibility.as_attention_mask()
        self._states, self._found, self._keys = self._with_gradients(self.ids, intervals, positions)
        # One run for three things: the truth, how far one rounding moves it, and what the model says if the mask hides
        # nothing, which must be further away.
        self.attend("eager")
        seen, blind = self.visibility.to_dense(), causal(self.is_token).to_dense()
        masks = self.repeat(self.as_scores(seen), self.as_scores(blind))
        with _rounded(self.model, len(_ROWS), self.eps):
            repeated, self._true, _ = self._with_gradients(self.repeat(self.ids), masks, self.repeat(positions))
        return self.set_bounds(self._states, repeated, (seen != blind).any(-1))

    def gradient(self) -> tuple[float, float, str]:
        return self.compare_gradients(self._found, self._true, 2)

    def positions(self) -> tuple[float, float, str]:
        reason = "its results depend on where positions start: they are absolute, learned, scaled or in a table"
        self.attend("gist")
        from_zero = self._from_zero()[:1]
        anchored: Any = self.visibility.position_ids
        is_token = self.is_token
        first = [part[:1] for part in self._states]  # of row 0, which has no padding

        def at(positions: Tensor, *rows: int) -> tuple[list[Tensor], DynamicCache]:
            cache = DynamicCache()
            mask = Visibility(self.visibility.first[[*rows]], self.visibility.end[[*rows]])
            more: Any = {cache_argument(): cache, "use_cache": True}
            return self.states(self.ids[[*rows]], mask.as_attention_mask(), positions, **more), cache

        above = from_zero + self.shift
        try:
            with _NoNegativeIndex() if self.device.type != "cpu" else contextlib.nullcontext():
                found, cache = at(torch.cat([above, anchored]), 0, *range(len(_ROWS)))
        except (IndexError, RuntimeError):
            # A table has no entry below 0; those above tell whether it is relative all the same.
            found, _ = at(above, 0)
            error, bound = self.worst(found, first, self.shift * 2**-22)
            if error > bound:
                return error, bound, reason
            raise
        # Angles are float32 in every model: at this distance they are this much coarser.
        error, bound = self.worst([part[:1] for part in found], first, self.shift * 2**-22)
        if error > bound:
            return error, bound, reason
        moved: list[Any] = list(cache.layers)
        self.rotation = _rotation(self.model, self._keys, [layer.keys[:1] for layer in moved], self.shift)
        self._anchored = [part[1:] for part in found]
        worst = self.worst([part[is_token] for part in self._anchored], [part[is_token] for part in self._states])
        return *max((error, bound), worst, key=lambda one: one[0] / one[1]), f"{reason} (below 0 alone)"

    def cache(self) -> tuple[float, float, str]:
        self.attend("gist")
        cache: GistCache = decoder.prefix_states(self.model, self.tokens, self.prompts, CacheOrigin("", "", "", "gist"))
        # The last token is generated: whatever the model would say, it is the one that was read before.
        given, last = [rest[:-1] for rest in self.rests], torch.tensor([rest[-1] for rest in self.rests])
        arguments, _ = decoder.prepare_generation(self.model, self.tokens, cache, given)
        arguments[cache_argument()].gist_mask = None  # A patched model would look for its own gist token.
        forced: Any = [_Forced(last.to(self.device))]
        out = self.model.generate(**arguments, generation_config=self.greedy(), logits_processor=forced)
        # (B, 2, d_model) for each layer, and (B, 2, V)
        steps = [_layers(step, step[0].shape[:2]) for step in out.hidden_states or ()]
        found = [torch.stack([step[:, -1] for step in layer], 1) for layer in zip(*steps, strict=True)]
        found.append(torch.stack(out.logits, 1))
        return *self.worst(found, [part[:, -2:] for part in self._anchored]), (
            "something besides the gists' keys and values carries the prompt on, or a layer ignores the mask, or does "
            "not read them from the cache"
        )

    def window(self) -> tuple[float, float, str]:
        ids = self.ids[:1]
        positions = torch.arange(ids.shape[1])[None]
        intervals = causal(torch.ones_like(ids, dtype=torch.bool)).as_attention_mask()
        with _windows(self.model, _WINDOW):
            self.attend("eager")
            truth = self.states(ids, None, positions)
            self.attend("gist")
            found = self.states(ids, intervals, positions)
        with _windows(self.model, 1 << 20):
            wide = self.states(ids, intervals, positions)
        error, bound = self.worst(found, truth)
        if error <= bound and not self.exceeds(wide, truth):
            return math.inf, bound, "its windows could not be made shorter, so they were not tried"
        return error, bound, "a layer with a window does not name it to the attention function"

    def ordinary(self) -> tuple[float, float, str]:
        error = 0.0
        short, is_token = self.ids[:, _ORDINARY], self.is_token[:, _ORDINARY]
        for ids, mask in ((short, is_token.long()), (short[:1], None)):
            known = is_token if mask is not None else torch.ones_like(ids, dtype=torch.bool)
            found = []
            for kind in ("base", "gist"):
                self.attend(kind)
                found.append(self.states(ids, mask, None)[-1][known])
            error = max(error, self.difference(found[1], found[0]))
        return error, 0.0, "a layer does not leave the choice of attention to its config"

    # -- what they need ------------------------------------------------------------------------------------------------

    def _from_zero(self) -> Tensor:
        positions: Any = self.visibility.position_ids
        lowest = torch.where(self.is_token, positions, positions.amax()).amin(-1, keepdim=True)
        return (positions - lowest).clamp(min=0)

    def _with_gradients(
        self, ids: Tensor, mask: Tensor, positions: Tensor
    ) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        """Run with a loss on the rest.

        Returns:
            The states, the gradients of every layer's keys and values, and the keys of row 0.
        """
        cache = DynamicCache()
        more: Any = {cache_argument(): cache, "use_cache": True}
        with _hooked(self.model, _require_gradient), torch.enable_grad():
            states = self.states(ids, mask, positions, **more)
            rest = states[-1][:, -min(rest for _, _, rest in _ROWS) :].float()
            layers: list[Any] = list(cache.layers)
            parts = [part for layer in layers for part in (layer.keys, layer.values)]
            # Layers whose activations are quantised may have no gradient at all.
            known = [part for part in parts if part.requires_grad]
            loss = (rest * self.weights(rest)).sum()
            gradients = iter(torch.autograd.grad(loss, known, allow_unused=True) if known else ())
        return (
            [part.detach() for part in states],
            [
                None if gradient is None else gradient.transpose(1, 2)
                for gradient in (next(gradients) if part.requires_grad else None for part in parts)
            ],
            [layer.keys[:1].detach() for layer in layers],
        )


class _EncoderDecoder(_Runs):
    """The runs of one encoder-decoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.visibility = encoder_gist(self.is_gist, self.is_token)

    def run(self) -> ModelCheck:
        with _windows(self.model, 1 << 20):
            is_right = self.compare(
                "mask", f"states and logits of {self.rows}, through interval attention and with a dense mask", self.mask
            )
            is_right = is_right and self.compare(
                "gradient",
                "gradients of the gists' states in every layer of the encoder, in the same two runs",
                self.gradient,
            )
            is_right = is_right and self.compare(
                "positions",
                f"states and logits of {self.rows}, with and without {_PADDING} tokens of padding",
                self.positions,
            )
            is_right = is_right and self.compare(
                "cache", "logits of two new tokens, from cached gists and from the full text", self.cache
            )
        if is_right and sliding_windows(self.model.config) is not None:
            problem = "windows are not supported in an encoder"
            self.comparisons.append(Comparison("window", "nothing", None, 0.0, problem))
        elif is_right:
            self.compare("ordinary", "logits of text without gist tokens, before and after patching", self.ordinary)
        return self.result()

    def states(self, ids: Tensor, mask: Tensor | None, seen: Tensor | None, targets: Tensor) -> list[Tensor]:
        """Return what each layer of the encoder makes of each token, ``(B, N, d_model)``, and the logits.

        Args:
            ids: int64 ``(B, N)``.
            mask: what the encoder's attention sees.
            seen: what the decoder sees of the encoder.
            targets: int64 ``(B, T)``, ids that the decoder reads.
        """
        mask = None if mask is None else mask.to(self.device)
        encoded = self.model.get_encoder()(
            input_ids=ids.to(self.device), attention_mask=mask, output_hidden_states=True
        )
        logits = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.last_hidden_state),
            attention_mask=None if seen is None else seen.to(self.device),
            decoder_input_ids=targets,
        ).logits
        return [*_layers(encoded.hidden_states, ids.shape), logits]

    def mask(self) -> tuple[float, float, str]:
        intervals = self.visibility.as_attention_mask()
        self.attend("gist")
        self._states, self._found = self._with_gradients(self.ids, intervals, intervals, self.targets)
        self.attend("eager")
        seen, blind = self.visibility.to_dense(), bidirectional(self.is_token).to_dense()
        masks = self.repeat(self.as_scores(seen), self.as_scores(blind))
        survivors = self.repeat(self.visibility.survivors().long(), self.is_token.long())
        with _rounded(self.model, len(_ROWS), self.eps):
            repeated, self._true = self._with_gradients(
                self.repeat(self.ids), masks, survivors, self.repeat(self.targets)
            )
        return self.set_bounds(self._states, repeated, (seen != blind).any(-1))

    def gradient(self) -> tuple[float, float, str]:
        return self.compare_gradients(self._found, self._true, 1)

    def positions(self) -> tuple[float, float, str]:
        self.attend("gist")
        ids = torch.nn.functional.pad(self.ids, (_PADDING, 0), value=self.tokens.pad_token_id)
        is_token = torch.nn.functional.pad(self.is_token, (_PADDING, 0), value=False)
        mask = encoder_gist(ids == self.tokens.gist_token_id, is_token).as_attention_mask()
        found, truth = (
            [*(layer[known] for layer in layers), logits.flatten(0, 1)]
            for known, (*layers, logits) in (
                (is_token, self.states(ids, mask, mask, self.targets)),
                (self.is_token, self._states),
            )
        )
        return *self.worst(found, truth), "its results depend on where positions start: they are absolute or learned"

    def cache(self) -> tuple[float, float, str]:
        self.attend("gist")
        origin = CacheOrigin("", "", "", "gist")
        cache = encoder_decoder.prefix_states(self.model, self.tokens, self.prompts, origin)
        arguments, _ = encoder_decoder.prepare_generation(self.model, self.tokens, cache, self.rests)
        out = self.model.generate(**arguments, generation_config=self.greedy())
        encodings = [
            GistEncoding(ids, prompt.gist_start, prompt.gist_end, len(ids))
            for ids, prompt in zip(self.full, self.prompts, strict=True)
        ]
        full = encoder_decoder.prepare_full_generation(self.model, self.tokens, encodings, "gist")
        truth = self.model(**full, decoder_input_ids=out.sequences[:, :2]).logits
        error = self.difference(torch.stack(out.logits, 1), truth)
        return error, self.bounds[-1], "its encoder does not take the gists' keys and values, or ignores the mask"

    def ordinary(self) -> tuple[float, float, str]:
        error = 0.0
        ids = self.ids[:, _ORDINARY]
        for mask in (self.is_token[:, _ORDINARY].long(), None):
            found = []
            for kind in ("base", "gist"):
                self.attend(kind)
                found.append(self.states(ids, mask, mask, self.targets)[-1])
            error = max(error, self.difference(found[1], found[0]))
        return error, 0.0, "a layer does not leave the choice of attention to its config"

    def _with_gradients(
        self, ids: Tensor, mask: Tensor, seen: Tensor, targets: Tensor
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Run with a loss on the targets, and return the gradients of every layer's states with them."""
        with _hooked(self.model, _require_gradient), torch.enable_grad():
            states = self.states(ids, mask, seen, targets)
            loss = (states[-1].float() * self.weights(states[-1])).sum()
            gradients = torch.autograd.grad(loss, states[:-1], allow_unused=True)
        return [part.detach() for part in states], list(gradients)


def _require_gradient(module: Any, args: Any, out: Tensor) -> Tensor:
    return out.requires_grad_()


def _layers(states: Sequence[Tensor] | None, shape: Sequence[int]) -> list[Tensor]:
    """What each layer makes of each token. Gemma 3n's have another dimension in front, and are left out."""
    return [part for part in (states or ())[1:] if part.dim() == 3 and part.shape[:2] == tuple(shape)]


def _rotation(
    model: PreTrainedModel, keys: Sequence[Tensor], moved: Sequence[Tensor], by: int
) -> tuple[bool, tuple[bool, ...]] | None:
    """Find how keys are rotated: from every layer's ``keys``, and the same tokens' keys ``by`` positions later.

    Returns:
        Whether pairs are neighbours, and for each layer whether it rotates; None if neither pairing explains the keys.
    """
    frequencies = layer_frequencies(model)
    if frequencies is None or len(frequencies[1]) != len(keys):
        return None
    sets, numbers = frequencies
    candidates = [Rotary(sets, (None,) * len(numbers))] + [Rotary(sets, numbers, pairs) for pairs in (False, True)]
    found: list[int] = []
    for layer, (first_keys, moved_keys) in enumerate(zip(keys, moved, strict=True)):
        if 2 * len(sets[numbers[layer]]) > first_keys.shape[-1]:
            return None
        errors = [
            _difference(one.rotate(layer, first_keys, torch.tensor([by])), moved_keys, first_keys.dtype.itemsize <= 2)
            for one in candidates
        ]
        first, second = sorted(errors)[:2]
        if not first < second / 3:
            return None
        found.append(errors.index(first))
    if {1, 2} <= set(found):
        return None
    return 2 in found, tuple(number > 0 for number in found)


def _difference(found: Tensor, truth: Tensor, is_half: bool) -> float:
    """The largest difference of a token, in units of its own size; infinite if a value is not finite.

    In half precision, the largest of the lower three quarters: there rounding may send a token to other experts.

    Args:
        found: ``(..., n)``, with a token's numbers in the last dimension.
        truth: the same shape.
        is_half: whether the model computes in half precision, or may.
    """
    dtype = torch.promote_types(truth.dtype, torch.float32)
    found, truth = found.detach().to(dtype), truth.detach().to(dtype)
    errors = (found - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=1e-30)
    if not errors.isfinite().all():
        return math.inf
    return (errors.flatten().quantile(0.75) if is_half else errors.max()).item()


def _draw_ids(model: Any) -> list[int]:
    """Draw up to 64 different ids of ordinary tokens."""
    special = set(_special_ids(model.config.to_dict()))
    size = min(int(getattr(model.config.get_text_config(), "vocab_size", 0) or 1 << 30), input_weight(model).shape[0])
    order = torch.randperm(size, generator=torch.Generator().manual_seed(_SEED), device="cpu").tolist()
    return [id_ for id_ in order if id_ not in special][:64]


def _special_ids(config: dict[str, Any]) -> Iterator[int]:
    """Yield the ids that a config names, which may stand for images, or be masked by the model itself."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(key).endswith(("token_id", "token_index")):
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))


@contextlib.contextmanager
def _windows(model: PreTrainedModel, window: int) -> Iterator[None]:
    """Give every sliding window of a model another size for a block."""
    held: dict[int, tuple[Any, int]] = {}
    for module in model.modules():
        for place in (module, getattr(module, "config", None)):
            size: Any = getattr(place, "sliding_window", None)
            if isinstance(size, int):
                held.setdefault(id(place), (place, size))
    try:
        for place, _ in held.values():
            place.sliding_window = window
        yield
    finally:
        for place, size in held.values():
            place.sliding_window = size


@contextlib.contextmanager
def _rounded(model: Any, row: int, eps: float) -> Iterator[None]:
    """Change every embedding of a ``row`` by one rounding for a block, up or down at random."""

    def rounded(module: Any, args: Any, out: Tensor) -> Tensor:
        signs = torch.randint(0, 2, out[row].shape, generator=torch.Generator().manual_seed(_SEED)) * 2 - 1
        factors = torch.ones(out.shape, dtype=out.dtype, device=out.device)
        factors[row] += (signs * eps).to(out)
        return out * factors

    with _hooked(model, rounded):
        yield


@contextlib.contextmanager
def _hooked(model: PreTrainedModel, hook: Callable[..., Tensor]) -> Iterator[None]:
    """Change what the input embedding returns for a block; T5's stacks have a module each for one weight."""
    weight = input_weight(model)
    places = [module for module in model.modules() if getattr(module, "weight", None) is weight]
    places = [module for module in places if isinstance(module, torch.nn.Embedding)] or [model.get_input_embeddings()]
    handles = [place.register_forward_hook(hook) for place in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Forced(LogitsProcessor):
    """Let every row generate a token of its own choice.

    Args:
        ids: int64 ``(B,)``.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -math.inf).scatter(1, self.ids[:, None], 0.0)


class _NoNegativeIndex(TorchDispatchMode):
    """Raise where a position below 0 looks something up: after such an error, a GPU can do nothing more."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices: Any = ()
        name = func.overloadpacket.__name__
        if name in ("embedding", "gather", "index_select", "index"):
            indices = args[1] if name in ("embedding", "index") else args[2]
        for index in indices if isinstance(indices, list | tuple) else (indices,):
            if isinstance(index, Tensor) and index.dtype == torch.int64 and index.numel() and index.amin() < 0:
                raise IndexError(f"it looks positions up in a table, and there is none at {int(index.amin())}")
        return func(*args, **(kwargs or {}))


def _recurrent(model: PreTrainedModel) -> str:
    """Name a layer that is recurrent or convolutional, which explains every failure; empty if there is none."""
    found = next(
        (
            type(module).__name__
            for module in model.modules()
            if isinstance(module, torch.nn.Conv1d) or re.search(_RECURRENT, type(module).__name__, re.IGNORECASE)
        ),
        None,
    )
    return "" if found is None else f"{found} carries the prompt in a state that no attention mask can hide"


def _about_masks(model: PreTrainedModel) -> str:
    if any("sink" in name.rpartition(".")[2] for name, _ in model.named_parameters()):
        return "its attention has sinks, one more term in the softmax"
    return "a layer changes scores or masks outside the attention function, or ignores the mask"

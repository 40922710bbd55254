"""Try every causal and sequence-to-sequence model type of the installed transformers: are its gists exact?

Each type gets a tiny random model, float32 and with large weights, and ``gisting.check_model``. For what the check
accepts, longer texts must then give the same logits from a cached gist as from the full text on an unpatched model,
with a dense mask, windows applied by hand, and positions that count from the first token of the text. A type is

    right        accepted, and exact on the longer texts
    WRONG        accepted, and not exact: a fault of the check
    refused      by the config or by a comparison of the check, with the reason
    not tried    its config needs more than common sizes to become tiny
"""

from __future__ import annotations

import copy
import inspect
import logging
import random
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

import gisting
from benchmarks.command import OutputOption, Rows, say
from benchmarks.models import letters
from gisting.data.tasks import task_tokenizer
from gisting.errors import UnsupportedModelError
from gisting.markdown import markdown_table
from gisting.models import decoder, encoder_decoder
from gisting.models.registry import sliding_windows
from gisting.tokens import GistTokenizer
from gisting.visibility import encoder_gist, gist

__all__ = ["KINDS", "FamilyRow", "build", "error_of", "examine", "families_table", "main", "model_types"]

KINDS = ("decoder", "encoder-decoder")
#: What the longer texts are: tokens of the prompt, k, tokens of the input.
TEXTS = ((21, 3, 8), (9, 1, 5))
NEW_TOKENS = 4
# Float32 over three layers with weights five times the usual size; a wrong mask is off by 0.1 and more.
BOUND = 1e-3
_SECONDS = 60
_LAYERS = {
    "num_hidden_layers": 3,
    "n_layer": 3,
    "n_layers": 3,
    "num_layers": 3,
    "decoder_layers": 2,
    "encoder_layers": 2,
}
_WIDTH = {"hidden_size": 32, "n_embd": 32, "d_model": 32}
_HEADS = {
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_global_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "d_kv": 8,
    "rotary_dim": 4,
}
_FEEDFORWARD = dict.fromkeys(
    ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48
) | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24)
_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
_OTHER = {
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    "original_max_position_embeddings": 64,
    "sliding_window": 8,
    "relative_attention_max_distance": 20,
    "relative_attention_num_buckets": 8,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "attention_dropout": 0.0,
    "dropout_rate": 0.0,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_SETTINGS = {**_LAYERS, **_WIDTH, **_HEADS, **_FEEDFORWARD, **_EXPERTS, **_LATENT, **_OTHER}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1}
# Their default has the other kind in later layers only, or none of it.
_BOTH = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# What single types need besides: sizes that must fit together, and tables that are large whatever the other sizes are.
_OF_TYPE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe"), _BOTH),
    **dict.fromkeys(("flint", "gemma3_text", "kolibri1", "olmo3"), _BOTH),
    "bamba": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": None,
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0}},
    "gpt_neo": {
        "num_hidden_layers": 2,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "moshi": {"audio_vocab_size": 64},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2, "num_hidden_layers": None},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "attention_head_size": 8},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "xlnet": {"max_position_embeddings": None},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "blt": {"encoder_hash_byte_group_vocab": 64},
}
_MOST_PARAMETERS = 10_000_000


@dataclass(frozen=True)
class FamilyRow:
    """What was found about a model type. ``check`` names the comparison that refused it, or ``config``."""

    kind: str
    model_type: str
    verdict: str
    check: str = ""
    reason: str = ""
    error: float | None = None
    bound: float | None = None


def model_types(kind: str) -> list[str]:
    """Return every model type of this kind that transformers loads with an auto class."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind == "encoder-decoder":
        names = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return sorted(names)


def build(kind: str, model_type: str, vocab_size: int | None = None, **changes: Any) -> PreTrainedModel:
    """Make a tiny random float32 model in eval mode, with weights so large that attention is far from uniform.

    ``vocab_size`` is by default that of the built-in task's tokenizer.

    Raises:
        Exception: whatever transformers raises for sizes that do not fit together.
    """
    if vocab_size is None:
        vocab_size = len(task_tokenizer().tokenizer)  # pyright: ignore[reportArgumentType]
    config = CONFIG_MAPPING[model_type](**{**_sizes(CONFIG_MAPPING[model_type], vocab_size), **changes})
    if kind == "encoder-decoder":
        config.decoder_start_token_id = 0
    elif hasattr(config, "is_decoder"):
        config.is_decoder = True
    auto = AutoModelForCausalLM if kind == "decoder" else AutoModelForSeq2SeqLM
    with torch.device("meta"):
        number = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if number > _MOST_PARAMETERS:
        raise MemoryError(f"{number:,} parameters are not tiny")
    torch.manual_seed(1)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def _sizes(config_class: Any, vocab_size: int, depth: int = 0) -> dict[str, Any]:
    default = config_class()
    sizes = {key: value for key, value in _SETTINGS.items() if _is_setting(default, key)}
    sizes["vocab_size"] = vocab_size
    if "kv_lora_rank" in sizes:  # Every head has keys of its own, whose size is a sum.
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = 4
    if sizes.get("num_experts_per_tok") and getattr(default, "num_experts_per_tok", 0) == 1:
        sizes["num_experts_per_tok"] = 1
    if depth < 3:
        for key in getattr(config_class, "sub_configs", None) or {}:
            # Its class may be AutoConfig; what it is by default says which one is meant.
            inner = type(getattr(default, key, None))
            if issubclass(inner, PreTrainedConfig):
                sizes[key] = _sizes(inner, vocab_size, depth + 1)
    for key, value in _OF_TYPE.get(config_class.model_type, {}).items():
        sizes[key] = {**sizes.get(key, {}), **value} if isinstance(value, dict) else value
    return {key: value for key, value in sizes.items() if value is not None}


def _is_setting(default: Any, key: str) -> bool:
    """Whether a config has a size of this name that can be given, and not one that it computes from others."""
    computed = inspect.getattr_static(type(default), key, None)
    if isinstance(computed, property) and computed.fset is None:
        return False
    try:
        return hasattr(default, key)
    except Exception:  # noqa: BLE001 - a size that is given for each layer by itself cannot be read for all
        return True


def examine(kind: str, model_type: str) -> FamilyRow:
    """Build a tiny model of a type, check it, and try what is accepted on longer texts."""
    with _quiet(), _limited(_SECONDS):
        try:
            model = build(kind, model_type)
        except Exception as error:  # noqa: BLE001 - whatever transformers raises is the finding
            return FamilyRow(kind, model_type, "not tried", reason=_first_line(error))
        try:
            found = gisting.check_model(model)
        except UnsupportedModelError as error:
            return FamilyRow(kind, model_type, "refused", "config", str(error))
        if found.failed is not None:
            one = found.failed
            return FamilyRow(kind, model_type, "refused", one.name, one.problem, one.error, one.bound)
        try:
            error = error_of(kind, model_type)
        except Exception as fault:  # noqa: BLE001 - a fault of the check as well
            return FamilyRow(kind, model_type, "WRONG", reason=f"{type(fault).__name__}: {_first_line(fault)}")
    return FamilyRow(kind, model_type, "right" if error <= BOUND else "WRONG", error=error, bound=BOUND)


def error_of(kind: str, model_type: str) -> float:
    """Return how far logits from cached gists are from those of an unpatched model with a dense mask.

    Returns:
        The largest difference of the logits of the new tokens, in units of the largest logit.
    """
    model: Any = build(kind, model_type)
    # transformers lists models that read sound with a decoder alone among its sequence-to-sequence models.
    runs = encoder_decoder if model.config.is_encoder_decoder else decoder
    tokenizer = task_tokenizer()
    if runs is encoder_decoder:
        tokenizer = GistTokenizer(tokenizer.tokenizer, tokenizer.template, is_encoder_decoder=True)
    gisting.patch(model, tokenizer)
    stock: Any = build(kind, model_type, int(model.get_input_embeddings().weight.shape[0]))  # pyright: ignore[reportArgumentType]
    stock.load_state_dict(model.state_dict())
    stock.set_attn_implementation("eager")
    chance = random.Random(3)
    prompts = [letters(chance, prompt) for prompt, _, _ in TEXTS]
    inputs = [letters(chance, rest) for _, _, rest in TEXTS]
    counts = [k for _, k, _ in TEXTS]
    cache = gisting.compress(model, tokenizer, prompts, counts)
    encodings = tokenizer.encode_batch(prompts, inputs, num_gist_tokens=counts)
    worst = 0.0
    with torch.no_grad():
        for row, rest in enumerate(tokenizer.encode_continuations(inputs)):
            arguments, given = runs.prepare_generation(model, tokenizer, cache[row], [rest])
            out = model.generate(
                **copy.deepcopy(arguments),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            found = torch.stack(out.logits, dim=1)[0]
            ids = torch.tensor([encodings[row].input_ids])
            if runs is decoder:
                ids = torch.cat([ids, out.sequences[:, given : given + NEW_TOKENS - 1]], dim=1)
                seen = gist(ids == tokenizer.gist_token_id).to_dense()
                truth = stock(
                    ids, attention_mask=_dense_mask(stock.config, seen), position_ids=torch.arange(ids.shape[1])[None]
                ).logits[0, -NEW_TOKENS:]
            else:
                visibility = encoder_gist(ids == tokenizer.gist_token_id)
                states = stock.get_encoder()(ids, attention_mask=_scores(visibility.to_dense()))
                truth = stock(
                    encoder_outputs=states,
                    attention_mask=visibility.survivors().long(),
                    decoder_input_ids=out.sequences[:, :NEW_TOKENS],
                ).logits[0]
            worst = max(worst, ((found - truth).abs().max() / truth.abs().max()).item())
    return worst


def _scores(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def _dense_mask(config: Any, seen: Tensor) -> Any:
    """A dense mask in the form that a stock model takes, which applies no window to a mask of four dimensions."""
    window = sliding_windows(config)
    if window is None:
        return _scores(seen)
    age = torch.arange(seen.shape[-1])[:, None] - torch.arange(seen.shape[-1])[None]
    windowed = _scores(seen & (age < window))
    if "full_attention" not in (getattr(config.get_text_config(), "layer_types", None) or ()):
        return windowed
    return {"full_attention": _scores(seen), "sliding_attention": windowed}


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what transformers says about sizes that no real model has."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise in a block that takes longer; some types never become tiny."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def families_table(rows: Sequence[dict[str, Any]]) -> str:
    """Make the tables of right and refused types, as Markdown."""
    lines: list[str] = []
    versions = f"torch {rows[0]['torch']}, transformers {rows[0]['transformers']}"
    for kind in KINDS:
        here = [row for row in rows if row["kind"] == kind]
        cells = []
        for verdict in ("right", "WRONG", "refused", "not tried"):
            found = [row for row in here if row["verdict"] == verdict]
            for check in dict.fromkeys(row["check"] for row in found):
                names = [row["model_type"] for row in found if row["check"] == check]
                cells.append((f"{verdict} ({check})" if check else verdict, len(names), ", ".join(names)))
            if verdict == "WRONG" and not found:
                cells.append((verdict, 0, ""))
        listed = "" if kind == "decoder" else ", as transformers lists them (some read sound and have a decoder alone)"
        title = f"{kind.capitalize()}s{listed}, {len(here)} types of {versions}:"
        lines += [title, "", *markdown_table(("verdict", "types", "which"), cells), ""]
    return "\n".join(lines[:-1])


def main(
    output: OutputOption = None,
    only: Annotated[str, typer.Option(help="Model types to try, separated by commas; all by default.")] = "",
) -> int | None:
    """Try every model type of the installed transformers: right, refused and why, or accepted and wrong."""
    rows = Rows("families", output)
    chosen = set(only.split(",")) if only else None
    for kind in KINDS:
        for model_type in model_types(kind):
            if chosen is None or model_type in chosen:
                row = examine(kind, model_type)
                say(f"{row.kind} {row.model_type}: {row.verdict} {row.check} {row.reason}".rstrip())
                rows.add([row])
    rows.show(families_table)
    return 1 if any(row["verdict"] == "WRONG" for row in rows.rows) else None

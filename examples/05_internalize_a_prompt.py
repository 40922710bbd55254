"""Train a prompt into a model's weights stage by stage, and report what that saves and what it costs.

A tiny LLaMA starts from random weights. Every request begins with the same rules of a store, and asks where three
things are. One model is trained in stages in which the rules shrink to nothing, and then answers the bare query. Its
control is trained in as many steps with the rules in view, and always needs them. Another control is trained on bare
queries alone, which is enough if, as here, the answers name everything that the rules say. The report compares them
with each other and with prefix caching, at prices that you give. Takes about half a minute on one CPU core.

    python examples/05_internalize_a_prompt.py --steps 300 --output runs/store
"""

import argparse
import itertools
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

import gisting
from gisting.internalize.prices import Prices
from gisting.internalize.report import make_report
from gisting.internalize.schedule import Schedule
from gisting.internalize.shorteners import Rewrites
from gisting.internalize.stages import internalize
from gisting.train.finetune import published_arguments

ROOMS = {"tea": "4", "soap": "2", "glue": "6", "rice": "1", "paper": "5", "bread": "3"}
PROMPT = "answer with rooms alone . " + " ".join(f"the {thing} is in room {room} ." for thing, room in ROOMS.items())
SHORTER = " ".join(f"{thing} {room} ." for thing, room in ROOMS.items())


def make_tokenizer() -> gisting.GistTokenizer:
    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted({*PROMPT.split()})]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return gisting.GistTokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, **special), "plain")


def make_records() -> list[gisting.Record]:
    """Make all queries in random order; the instruction is ignored, because the prompt is given once for all."""
    queries = list(itertools.product(ROOMS, repeat=3))
    random.Random(0).shuffle(queries)
    return [gisting.Record("-", " ".join(query), " ".join(ROOMS[thing] for thing in query)) for query in queries]


def fresh_model(tokenizer: gisting.GistTokenizer):
    """Make a model with the same weights each time."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer.tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.06,  # the usual 0.02 is for wide models
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return gisting.patch(AutoModelForCausalLM.from_config(config), tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps of each run, all stages together")
    parser.add_argument("--output", type=Path, default=Path("runs/store"))
    parser.add_argument("--input-price", type=float, default=2.5, help="price of a million tokens")
    parser.add_argument("--cached-input-price", type=float, default=1.25)
    parser.add_argument("--output-price", type=float, default=10.0)
    parser.add_argument("--training-price", type=float, default=25.0)
    arguments = parser.parse_args()

    tokenizer, records = make_tokenizer(), make_records()
    training, held_out = records[:160], records[160:]

    for name, control in (("in-stages", None), ("full", "full"), ("bare", "bare")):
        model = fresh_model(tokenizer)
        result = internalize(
            model,
            tokenizer,
            PROMPT,
            training,
            published_arguments(
                arguments.output / name,
                batch_size=16,
                per_device_batch_size=16,
                max_steps=arguments.steps,
                learning_rate=3e-3,  # a tiny model needs more than the published 2e-5 for 7 billion parameters
                warmup_steps=10,
                save_strategy="no",
                logging_steps=1000,
                disable_tqdm=True,
            ),
            schedule=Schedule((1.0, 0.5, 0.0)),
            shortener=Rewrites({0.5: SHORTER}),
            control=control,
            eval_records=held_out,
            max_new_tokens=4,
            on_stage=lambda stage, name=name: print(f"{name}, stage {stage.number}: loss {stage.train_loss:.3f}"),
        )
        print(f"{name}: {result.tokens:.1f} tokens per request, {100 * result.metrics['exact_match']:.1f} % exact\n")

    prices = Prices(
        "USD",
        arguments.input_price,
        arguments.cached_input_price,
        arguments.output_price,
        arguments.training_price,
    )
    report = make_report([arguments.output / name for name in ("in-stages", "full", "bare")], prices)
    (arguments.output / "report.md").write_text(report.markdown(), encoding="utf-8")
    print(report.markdown())


if __name__ == "__main__":
    main()

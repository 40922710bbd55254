"""Teach a frozen model to gist with an adapter that acts at gist tokens only.

First a base model learns to answer questions about a sentence, with the question in view. Then gist-only LoRA learns to
compress the question into two gist tokens. The result is an ordinary cache of keys and values, so the base model itself
continues from it, without the adapter and at no extra cost.

It was written for a small pretrained LLaMA such as the TinyStories model with 260 thousand parameters
(karpathy/tinyllamas in Hugging Face layout). Any causal language model of a supported family works.

    python examples/03_gist_only_lora.py PATH_OR_NAME --steps 200 --output runs/adapter
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import set_seed

import gisting
from gisting.train.finetune import finetune, published_arguments
from gisting.train.methods import Method

NAMES = "Lily Tom Sam Mia Ben Anna Max Sue Tim Amy Jack Lucy".split()
THINGS = "ball hat car doll cat book box bird".split()
QUESTIONS = ("Say the name.", "Say the thing.")


def make_records(count: int, seed: int) -> list[gisting.Record]:
    chance = random.Random(seed)
    records = []
    for _ in range(count):
        facts = (chance.choice(NAMES), chance.choice(THINGS))
        asked = chance.randrange(2)
        records.append(gisting.Record(QUESTIONS[asked], f"{facts[0]} saw a {facts[1]}.", facts[asked]))
    return records


@torch.no_grad()
def read(model, tokenizer) -> torch.Tensor:
    """Compute the logits of ordinary text."""
    return model(**tokenizer.tokenizer("Once upon a time", return_tensors="pt")).logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("runs/adapter"))
    arguments = parser.parse_args()

    set_seed(0)
    records = make_records(arguments.steps * 32, seed=0)

    def settings(name: str, learning_rate: float):
        return published_arguments(
            arguments.output / name,
            batch_size=32,
            per_device_batch_size=32,
            max_steps=arguments.steps,
            learning_rate=learning_rate,  # small models need more than the published 2e-5, which is for 7 billion
            save_strategy="no",
            logging_steps=50,
            disable_tqdm=True,
        )

    model, tokenizer = gisting.load(arguments.model, "plain")
    finetune(model, tokenizer, records, settings("base", 3e-3), num_gist_tokens=2, conditions="positive")

    model, tokenizer = gisting.load(arguments.output / "base")
    method = Method("gist-lora", rank=16)
    metrics = finetune(model, tokenizer, records, settings("adapter", 1e-2), method=method, num_gist_tokens=2)
    print(f"{metrics['num_trainable_parameters']:,} of {metrics['num_parameters']:,} parameters trained")

    # The saved files are the adapter. It names its base model, which is loaded with it and frozen.
    model, tokenizer = gisting.load(arguments.output / "adapter")
    base, _ = gisting.load(arguments.output / "base")
    print("ordinary text has the bits of the base model:", torch.equal(read(model, tokenizer), read(base, tokenizer)))

    # The base model reads the gists without the adapter.
    cache = gisting.compress(model, tokenizer, QUESTIONS, num_gist_tokens=2)
    for name, thing in (("Lily", "car"), ("Max", "bird")):
        sentence = f"{name} saw a {thing}."
        answers = gisting.generate(base, tokenizer, [sentence] * 2, cache=cache, max_new_tokens=6, do_sample=False)
        for question, answer in zip(QUESTIONS, answers, strict=True):
            print(f"{sentence}  {question}  ->  {answer}")


if __name__ == "__main__":
    main()

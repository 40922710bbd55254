"""Teach an existing checkpoint to gist: patch it, finetune it on questions about sentences, compress, generate.

It was written for a small pretrained LLaMA such as the TinyStories model with 260 thousand parameters
(karpathy/tinyllamas in Hugging Face layout), which takes about a minute on two CPU cores. Any causal language model of
a supported family works.

    python examples/02_finetune_a_checkpoint.py PATH_OR_NAME --steps 400 --output runs/stories
"""

import argparse
import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import gisting
from gisting.eval.conditions import evaluate
from gisting.train.finetune import finetune, published_arguments

NAMES = "Lily Tom Sam Mia Ben Anna Max Sue Tim Amy Jack Lucy".split()
COLOURS = "red blue green pink white black".split()
THINGS = "ball hat car doll cat book box bird".split()
PLACES = "park house garden box tree school".split()
SENTENCES = (
    "{name} saw a {colour} {thing} in the {place}.",
    "One day, {name} found a {colour} {thing} in the {place}.",
    "In the {place}, {name} had a {colour} {thing}.",
)
QUESTIONS = {
    "name": ("Who is it?", "Say the name.", "Tell me who."),
    "colour": ("What color is it?", "Say the color.", "Tell me the color."),
    "thing": ("What is it?", "Say the thing.", "Tell me what."),
    "place": ("Where is it?", "Say the place.", "Tell me where."),
}


def make_records(count: int, seed: int, held_out: bool) -> list[gisting.Record]:
    """Make new sentences. A fifth of the pairs of colour and thing are held out from training."""
    chance = random.Random(seed)
    pairs = [(a, b) for i, a in enumerate(COLOURS) for j, b in enumerate(THINGS) if ((i + j) % 5 == 0) == held_out]
    records = []
    for _ in range(count):
        colour, thing = chance.choice(pairs)
        facts = {"name": chance.choice(NAMES), "colour": colour, "thing": thing, "place": chance.choice(PLACES)}
        asked = chance.choice(list(QUESTIONS))
        sentence = chance.choice(SENTENCES).format(**facts)
        records.append(gisting.Record(chance.choice(QUESTIONS[asked]), sentence, facts[asked]))
    return records


def continue_story(model, tokenizer) -> list[int]:
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)[0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", default="runs/stories")
    parser.add_argument("--eval-records", type=int, default=200)
    arguments = parser.parse_args()

    set_seed(0)
    base = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)

    before = continue_story(model, base)
    tokenizer = gisting.GistTokenizer(base, "plain")
    gisting.patch(model, tokenizer)
    print("ordinary text is as before patch:", continue_story(model, base) == before)

    metrics = finetune(
        model,
        tokenizer,
        make_records(arguments.steps * 32, seed=0, held_out=False),
        published_arguments(
            arguments.output,
            batch_size=32,
            per_device_batch_size=32,
            max_steps=arguments.steps,
            learning_rate=3e-3,  # small models need more than the published 2e-5, which is for 7 billion
            save_strategy="no",
            logging_steps=100,
        ),
        num_gist_tokens=2,
        conditions={"gist": 3, "positive": 1},
    )
    print(f"trained in {metrics['train_runtime']:.0f} s")

    for result in evaluate(
        model,
        tokenizer,
        make_records(arguments.eval_records, seed=1, held_out=True),
        num_gist_tokens=2,
        max_new_tokens=8,
        batch_size=50,
        with_rouge=False,
    ):
        share = f"{100 * result.exact_match:5.1f} %"
        print(f"{result.condition:9} {share} exact, on held-out sentences")

    cache = gisting.compress(model, tokenizer, ["What color is it?", "Tell me where."], num_gist_tokens=2)
    sentence = "One day, Jack saw a green hat in the garden."
    print(sentence)
    for prompt, answer in zip(
        ["What color is it?", "Tell me where."],
        gisting.generate(model, tokenizer, [sentence] * 2, cache=cache, max_new_tokens=8, do_sample=False),
        strict=True,
    ):
        print(f"  {prompt}  ->  {answer}   (from 2 cached gist tokens)")


if __name__ == "__main__":
    main()

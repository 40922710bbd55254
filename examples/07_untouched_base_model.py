"""From conversations to gists that an untouched base model reads: train, compress, store, answer, serve.

A chat model keeps its weights, and an adapter learns to compress system messages. The adapter is needed to compress
only: its gists belong to the base model, and one store serves the base model itself, stock ``generate`` without
gisting's patch, and vLLM.

    python examples/07_untouched_base_model.py MODEL --data conversations.jsonl --output runs/support

MODEL is a chat model with a chat template, such as SmolLM2-135M-Instruct. Each line of the data is a conversation,
``{"messages": [{"role": "system", "content": ...}, {"role": "user", ...}, {"role": "assistant", ...}, ...]}``, perhaps
with ``tools``; without ``--data``, a few that are written below show that it runs. The system messages are compressed.
"""

import argparse
import shlex
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM

import gisting
from gisting import GistStore, GistTokenizer
from gisting.data.records import to_records
from gisting.generation import check_origin
from gisting.serving.command import serve_command, served_fingerprints
from gisting.train.finetune import finetune, published_arguments
from gisting.train.methods import Method
from gisting.train.objective import Objective

SHOPS = {
    "bakery": "You answer for a bakery. It opens at six and sells bread, rolls and cakes. Be brief and kind.",
    "library": "You answer for a library. It opens at nine and lends books for four weeks. Be brief and kind.",
}
ASKED = {
    "When do you open?": {"bakery": "We open at six.", "library": "We open at nine."},
    "What do you have?": {"bakery": "Bread, rolls and cakes.", "library": "Books, for four weeks."},
}


def conversations() -> Dataset:
    """Make a data set of conversations of two turns."""
    rows = []
    for shop, system in SHOPS.items():
        messages = [{"role": "system", "content": system}]
        for question, answers in ASKED.items():
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answers[shop]}]
        rows.append({"messages": messages})
    return Dataset.from_list(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/support"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("-k", "--num-gist-tokens", type=int, default=4)
    arguments = parser.parse_args()
    adapter, folder, k = arguments.output / "adapter", arguments.output / "store", arguments.num_gist_tokens

    model, tokenizer = gisting.load(arguments.model, "chat")
    rows = conversations()
    if arguments.data is not None:
        rows = load_dataset("json", data_files=str(arguments.data), split="train")

    # 1. Train, on every answer of every conversation. The teacher of the distillation is the base model with the system
    # message in view.
    finetune(
        model,
        tokenizer,
        rows,
        published_arguments(
            adapter,
            batch_size=4,
            max_steps=arguments.steps,
            learning_rate=2e-3,
            save_strategy="no",
            disable_tqdm=True,
        ),
        method=Method("gist-lora"),
        objective=Objective(distillation=1.0),
        num_gist_tokens=k,
    )

    # 2. Compress the system messages into a store. From here on, the adapter is not needed.
    model, tokenizer = gisting.load(adapter)
    prompts = list(dict.fromkeys(record.instruction for record in to_records(rows, tokenizer)))
    names = [f"prompt-{number}" for number in range(1, len(prompts) + 1)]
    with GistStore(folder) as store:
        store.get_or_compress(model, tokenizer, prompts, k, names=names)
        print(
            *(f"{entry.name}: {entry.num_gist_tokens} gist tokens of {entry.model}" for entry in store.list()), sep="\n"
        )
    store = GistStore(folder, is_read_only=True)
    cache = store.get(names)
    # The questions of the first conversation, the last of them without its answer.
    asked = [message for message in rows[0]["messages"] if message["role"] != "system"][:-1]
    settings = {"max_new_tokens": 12, "do_sample": False}

    # 3. The base model, patched, answers with gisting.generate ...
    base, tokenizer = gisting.load(arguments.model, "chat")
    said = gisting.generate(base, tokenizer, [asked] * len(names), cache=cache, **settings)

    # 4. ... and stock, with transformers' own generate. The cache lays out what follows the system message.
    stock = AutoModelForCausalLM.from_pretrained(arguments.model)
    tokenizer = GistTokenizer.from_pretrained(adapter)
    check_origin(stock, tokenizer, cache)  # stock generate does not
    given = cache.stock_inputs(tokenizer, [asked] * len(names))
    out = stock.generate(**given, past_key_values=cache.as_past_key_values(), **settings)
    for name, ids, text in zip(names, out[:, given["input_ids"].shape[1] :].tolist(), said, strict=True):
        answer = tokenizer.decode(ids).strip()
        print(f"{name}: {asked[-1]['content']} -> {answer!r}, as with gisting.generate: {answer == text}")

    # 5. ... and in vLLM, by `gisting serve ADAPTER --store STORE`, which runs this command.
    try:
        print(shlex.join(serve_command(adapter, folder, fingerprint=served_fingerprints(adapter))))
    except gisting.GistError as error:
        print(f"vLLM needs a step more: {error}")


if __name__ == "__main__":
    main()

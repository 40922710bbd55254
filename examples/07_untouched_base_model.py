"""From conversations to gists that an untouched base model reads: train, compress, store, answer, serve.

A chat model keeps its weights, and an adapter learns to compress system messages. The adapter is needed to compress
only: its gists belong to the base model, and one store serves the base model itself, stock ``generate`` without
gisting's patch, and vLLM.

    python examples/07_untouched_base_model.py MODEL --data conversations.jsonl --output runs/support

MODEL is a chat model with a chat template, such as SmolLM2-135M-Instruct. Each line of the data is
``{"messages": [{"role": "system", "content": ...}, {"role": "user", ...}, {"role": "assistant", ...}]}``; without
``--data``, a few conversations that are written below show that it runs. The system messages are compressed.
"""

import argparse
import json
import shlex
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import gisting
from gisting import GistStore, GistTokenizer
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


def conversations() -> list[dict]:
    return [
        {
            "messages": [
                {"role": "system", "content": SHOPS[shop]},
                {"role": "user", "content": question},
                {"role": "assistant", "content": answers[shop]},
            ]
        }
        for question, answers in ASKED.items()
        for shop in SHOPS
    ]


def to_record(row: dict) -> gisting.Record:
    system, user, assistant = row["messages"]
    return gisting.Record(system["content"], user["content"], assistant["content"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/support"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("-k", "--num-gist-tokens", type=int, default=4)
    arguments = parser.parse_args()
    adapter, folder, k = arguments.output / "adapter", arguments.output / "store", arguments.num_gist_tokens

    rows = conversations()
    if arguments.data is not None:
        rows = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines()]

    # 1. Train. The teacher of the distillation is the base model with the system message in view.
    model, tokenizer = gisting.load(arguments.model, "chat")
    finetune(
        model,
        tokenizer,
        [to_record(row) for row in rows],
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

    # 2. Compress into a store. From here on, the adapter is not needed.
    model, tokenizer = gisting.load(adapter)
    names = [*SHOPS]
    with GistStore(folder) as store:
        store.get_or_compress(model, tokenizer, [*SHOPS.values()], k, names=names)
        print(
            *(f"{entry.name}: {entry.num_gist_tokens} gist tokens of {entry.model}" for entry in store.list()), sep="\n"
        )
    question = next(iter(ASKED))
    settings = {"max_new_tokens": 12, "do_sample": False}
    store = GistStore(folder, is_read_only=True)
    cache = store.get(names)

    # 3. The base model, patched, answers with gisting.generate ...
    base, tokenizer = gisting.load(arguments.model, "chat")
    by_name = dict(zip(names, gisting.generate(base, tokenizer, [question] * 2, cache=cache, **settings), strict=True))

    # 4. ... and stock, with transformers' own generate. The tokenizer writes what follows the system message.
    stock = AutoModelForCausalLM.from_pretrained(arguments.model)
    tokenizer = GistTokenizer.from_pretrained(adapter)
    (rest,) = tokenizer.encode_continuations([question])
    ids = torch.tensor([[tokenizer.gist_token_id] * k + rest])
    for name in names:
        cache = store[name]
        check_origin(stock, tokenizer, cache)  # stock generate does not
        past = cache.as_past_key_values()
        out = stock.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=past, **settings)
        answer = tokenizer.decode(out[0, ids.shape[1] :].tolist())
        print(f"{name}: {question} -> {answer!r}, as with gisting.generate: {answer == by_name[name]}")

    # 5. ... and in vLLM, by `gisting serve ADAPTER --store STORE`, which runs this command.
    try:
        print(shlex.join(serve_command(adapter, folder, fingerprint=served_fingerprints(adapter))))
    except gisting.GistError as error:
        print(f"vLLM needs a step more: {error}")


if __name__ == "__main__":
    main()

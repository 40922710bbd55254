"""Use a model that has learned to gist: compress prompts, save them, and answer a ragged batch.

The last part does the same with stock transformers.

    gisting demo --from-scratch --output runs/demo
    python examples/01_compress_and_generate.py runs/demo
"""

import sys
from pathlib import Path

import torch

import gisting

directory = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
model, tokenizer = gisting.load(directory)

prompts = [
    "please reverse the letters , drop the last letter and write capitals",
    "your task : keep the order , then change nothing else ; end with a bang .",
    "when you get letters , keep the order , replace each letter by the next , and always answer plainly",
]

# Prompts of different lengths go through the model once, in one batch, and leave two gist tokens each.
cache = gisting.compress(model, tokenizer, prompts, num_gist_tokens=2)
file = directory / "gists" / "three.gist.safetensors"  # not among the weights, all of which servers load
file.parent.mkdir(exist_ok=True)
cache.save(file)
cache = gisting.GistCache.load(file)
print(cache)

# One prompt for each input ...
print(gisting.generate(model, tokenizer, ["a b c d e", "f g h a b", "c a b d e"], cache=cache, do_sample=False))
# ... or one prompt for all of them.
print(gisting.generate(model, tokenizer, ["a b c d e", "f g h a b", "c a b d e"], cache=cache[0], do_sample=False))

# Stock transformers continues from the same states: k gist tokens in front, the cache as past_key_values.
rest = tokenizer.encode_continuations(["a b c d e"])[0]
ids = torch.tensor([[tokenizer.gist_token_id] * 2 + rest])
out = model.generate(
    ids,
    attention_mask=torch.ones_like(ids),
    past_key_values=cache[0].as_past_key_values(),
    max_new_tokens=16,
    do_sample=False,
)
print(tokenizer.decode(out[0, ids.shape[1] :].tolist()))

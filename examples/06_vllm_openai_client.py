"""Use compressed prompts in vLLM through the ``openai`` client: completions, a chat, a stream, and a mistake.

    pip install 'gist-tokens[vllm]' openai
    python examples/06_vllm_openai_client.py MODEL --store runs/store --only-compress
    gisting serve MODEL --store runs/store --served-model-name gisting        # in another terminal
    python examples/06_vllm_openai_client.py MODEL --store runs/store --url http://127.0.0.1:8000/v1

MODEL is a checkpoint that was trained to gist, such as the one that ``gisting demo --from-scratch`` makes.
"""

import argparse
from pathlib import Path

import gisting
from gisting import GistStore

PROMPTS = {"shout": "Repeat the words in capital letters.", "first": "Say the first word."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--store", type=Path, default=Path("runs/store"))
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--served-model-name", default="gisting")
    parser.add_argument("-k", "--num-gist-tokens", type=int, default=2)
    parser.add_argument("--only-compress", action="store_true")
    arguments = parser.parse_args()

    # Compressed once; a second run finds the gists in the store. The server may already be running.
    model, tokenizer = gisting.load(arguments.model)
    with GistStore(arguments.store) as store:
        names = [*PROMPTS]
        store.get_or_compress(model, tokenizer, [*PROMPTS.values()], arguments.num_gist_tokens, names=names)
        print(f"{arguments.store} holds {', '.join(entry.name for entry in store.list() if entry.name)}")
    if arguments.only_compress:
        return

    import openai

    client = openai.OpenAI(base_url=arguments.url, api_key=arguments.api_key)
    settings = {"model": arguments.served_model_name, "temperature": 0, "max_tokens": 16}
    for name in PROMPTS:
        # The text is an input: the server writes the template around it and puts the gist in front.
        made = client.completions.create(
            prompt="red green blue", extra_body={"kv_transfer_params": {"gist": name}}, **settings
        )
        print(f"{name}: {made.choices[0].text.strip()!r}, {made.usage.prompt_tokens} tokens read and cached")

    # In a chat the gist replaces the system message.
    gist = {"kv_transfer_params": {"gist": "shout"}}
    messages = [{"role": "user", "content": "red green blue"}]
    made = client.chat.completions.create(messages=messages, extra_body=gist, **settings)
    print(f"chat: {made.choices[0].message.content.strip()!r}")
    chunks = client.chat.completions.create(messages=messages, extra_body=gist, stream=True, **settings)
    print("stream:", repr("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices).strip()))

    try:
        client.completions.create(prompt="red", extra_body={"kv_transfer_params": {"gist": "unknown"}}, **settings)
    except openai.NotFoundError as error:
        print(f"a mistake: {error.response.json()['error']['message']}")


if __name__ == "__main__":
    main()

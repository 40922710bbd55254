"""Gist caches behind servers. Importing this imports no server; ``gisting.serving.vllm`` is what vLLM loads."""

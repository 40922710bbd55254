"""Serving gist caches. Importing this package imports no server; vLLM loads ``gisting.serving.vllm``."""

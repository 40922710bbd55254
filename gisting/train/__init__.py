"""Gist instruction finetuning on stock ``transformers.Trainer``."""

"""Prompt internalisation: a fixed template and its examples are phased out of the finetuning data, stage by stage."""

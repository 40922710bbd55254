"""Prompt internalisation: phase a fixed prompt and its examples out of the finetuning data, stage by stage."""

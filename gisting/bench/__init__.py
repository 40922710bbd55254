"""Measurements: every number beside its baseline, from the same run."""

"""Unmodified transformers models that understand intervals.

``registry`` registers with transformers, ``check`` tries whether gists are exact, ``patch`` switches a model over and
back, ``decoder`` and ``encoder_decoder`` run a prefix and continue from it, ``fingerprint`` identifies a model by its
weights, ``rotary`` reads how keys are rotated, ``load`` loads checkpoints, and ``hub`` saves and shares them.
"""

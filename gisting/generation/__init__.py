"""Compress prompts, and generate from the compressed states.

Place in the flow: cache -> **generation** -> text. ``compression`` runs prompts once; ``answers`` answers inputs from a
cache with stock ``model.generate``, and keeps the states for the next turn of a conversation; ``sampling`` samples
answers with the whole prompt in view. ``call`` collects and checks the settings of a call, ``streaming`` wraps its
streamer, and ``checks`` raises if a cache or a length does not fit the model. What differs between decoders and
encoder-decoders is behind :class:`gisting.models.architecture.Architecture`.
"""

from gisting.generation.answers import Turn, converse, generate
from gisting.generation.checks import check_origin
from gisting.generation.compression import compress

__all__ = ["Turn", "check_origin", "compress", "converse", "generate"]

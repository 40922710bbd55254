"""Text to ids: the gist token, the prompt template, and where the gist spans are.

Place in the flow: **text -> tokens** -> visibility -> attention -> cache -> generation -> text. Does not depend on
masks, models or tensors.
"""

from gisting.tokens.chat import ChatTemplate, Message
from gisting.tokens.encoding import GistEncoding, cut_into_chunks
from gisting.tokens.encoding import num_chunks as num_chunks
from gisting.tokens.template import TEMPLATES, Template
from gisting.tokens.tokenizer import GistTokenizer, read_tokenizer

__all__ = [
    "TEMPLATES",
    "ChatTemplate",
    "GistEncoding",
    "GistTokenizer",
    "Message",
    "Template",
    "cut_into_chunks",
    "read_tokenizer",
]

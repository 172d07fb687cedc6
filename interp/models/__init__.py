"""Small transformers of the project's own: enough of the modern variants to train in minutes and take apart exactly."""

from interp.models.tokenizer import WordTokenizer
from interp.models.transformer import Transformer, TransformerConfig

__all__ = ["Transformer", "TransformerConfig", "WordTokenizer"]

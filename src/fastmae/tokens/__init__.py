"""The token store: its format, codec, writer and reader. Knows nothing of torch models."""

from fastmae.tokens.reader import TokenStore, View

__all__ = ["TokenStore", "View"]

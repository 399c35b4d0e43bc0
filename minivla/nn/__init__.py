"""Blocks: one idea a file. They know tensors and segments, and no policy."""

"""The policies: one file a family, readable from top to bottom."""

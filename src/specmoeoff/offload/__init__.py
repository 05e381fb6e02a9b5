"""Bytes and where they lie: checkpoints read in place, what is kept of them, the KV cache."""

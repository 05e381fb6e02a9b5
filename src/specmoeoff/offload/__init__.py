"""Bytes and where they lie: checkpoints read in place, and what is kept of them in memory. Knows no model."""

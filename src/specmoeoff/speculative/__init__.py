"""Speculative decoding: who proposes draft tokens, and how the target verifies them."""

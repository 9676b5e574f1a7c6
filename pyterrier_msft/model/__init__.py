"""A cross-encoder: weights, tokenizer and scores."""

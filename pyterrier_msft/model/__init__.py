"""A cross-encoder: its weights, its tokenizer, its scores."""

"""Result frames, qrels and rankings to groups that a listwise loss learns from."""

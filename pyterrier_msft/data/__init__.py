"""Convert result frames, qrels and rankings to groups of labelled documents."""

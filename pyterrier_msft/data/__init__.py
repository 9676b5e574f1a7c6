"""Turns result frames, qrels and rankings into groups of labelled documents."""

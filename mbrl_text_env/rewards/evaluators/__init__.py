"""Rewards that judge by a lexicon, embeddings, a classifier, steps, or a language model."""

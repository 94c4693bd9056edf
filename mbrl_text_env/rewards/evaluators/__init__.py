"""Rewards from a lexicon, embeddings, a classifier, a process reward model or a language model."""

"""Composite rewards: combinations, rescaling, penalties, a cache and a time limit."""

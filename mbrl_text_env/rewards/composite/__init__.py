"""Rewards made of rewards: combinations, changes of scale, penalties, a cache, a time limit."""

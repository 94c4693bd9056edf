"""Reward models that are learned: preferences, features, fits, and the folder they are kept in."""

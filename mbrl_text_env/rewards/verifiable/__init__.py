"""Rewards that a program can check: answers, patterns, schemas, constraints, puzzles, code."""

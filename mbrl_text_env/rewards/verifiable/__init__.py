"""Rewards verified by a program: answers, patterns, schemas, constraints, puzzles, code."""

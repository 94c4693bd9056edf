"""Audit a reward model against a trusted one, the gold: is it safe to choose by?

`run` is all of it; `measures`: curves, agreement, reactions, and the verdict; `exploit_warnings`:
for a comparison.
"""

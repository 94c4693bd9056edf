"""Audit a reward model against a trusted one, the gold: is it safe to select by it?

`run` runs an audit, `measures` computes curves, agreement, reactions and the verdict, and
`exploit_warnings` checks comparisons.
"""

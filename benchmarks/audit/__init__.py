"""Audit a reward model against a gold reward: is it safe to choose by?

`curves` (best-of-N), `association` (correlation, pairs, calibration), `sensitivity` (changes that
should not matter), `verdict` (what follows, in words), `pool` (the responses and their scores),
`report` (terminal and picture), `run` (all of it), `trust` (the same counts for a comparison).
"""

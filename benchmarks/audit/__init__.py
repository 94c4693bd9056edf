"""Audit a reward model against a trusted one, the gold: is it safe to choose by?

`run` is all of it; `pool`: responses and their scores; `text_changes`: changes that should not
matter; `measures`: best-of-N curves, agreement, reactions; `verdict`: what follows, in words;
`report`: terminal and picture; `exploit_warnings`: for a comparison.
"""

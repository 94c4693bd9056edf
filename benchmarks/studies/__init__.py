"""Studies with the package; run them from a checkout, they are not in the wheel."""

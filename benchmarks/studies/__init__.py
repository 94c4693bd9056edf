"""Studies with the package: run from a checkout, and in no wheel."""

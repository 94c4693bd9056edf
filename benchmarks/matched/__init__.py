"""Agents against best-of-N at matched compute: pools, runs, analysis, figures."""

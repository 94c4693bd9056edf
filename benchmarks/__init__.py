"""Comparisons of agents at matched compute, their statistics, and the command line."""

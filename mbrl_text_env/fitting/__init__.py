"""Where heads on features are fitted, for values and learned rewards, and kept as numbers."""

"""The one room where heads on features are fitted: for values and learned rewards.

Heads are scikit-learn's estimators. They are chosen and judged on prompts that were left out, and
kept as numbers (safetensors and JSON), never as a pickle.
"""

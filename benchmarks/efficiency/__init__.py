"""What training and search gain for what they take: methods, analysis, figure."""

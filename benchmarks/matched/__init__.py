"""An agent beside best-of-N at matched compute: the pool, the rows, their table."""

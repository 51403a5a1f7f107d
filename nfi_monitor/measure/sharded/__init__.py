"""The same quantities where each rank holds a part: of every tensor (step), of the classes (rows)."""

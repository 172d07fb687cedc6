"""The gallery: one script a figure, each drawing only from committed results."""

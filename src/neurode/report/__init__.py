"""What a study shows: memory it measured, figures, and one self-contained page."""

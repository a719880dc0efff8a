"""Other people's readers beside ours, on the same rows."""

"""What people look at: contact sheets and training curves, drawn with matplotlib (extra `show`)."""

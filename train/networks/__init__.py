"""The networks that are built in: a trunk for each field that is seen, joined by one head."""

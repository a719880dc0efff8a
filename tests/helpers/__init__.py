"""What several test files need: sets and their damage, manifests as JSON, commands and servers."""

"""Made-up rooms in the layout of the .mat, for the demo and the tests."""

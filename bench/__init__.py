import convert  # noqa: F401 (an unsuitable Python or system ends here, in one line)

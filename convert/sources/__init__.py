"""Where rows come from: each source gives its rows, its facts and the specification of its data set."""

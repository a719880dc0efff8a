"""Where rows come from: each source gives its rows, facts and the specification of its set.

    nyu_mat.py       what is in nyu_depth_v2_labeled.mat
    nyu_tables.py    its published tables
    chunks.py        rows of an HDF5 dataset, without HDF5
      chunk_index.py   where its chunks lie, as was seen
      chunk_codec.py   from their bytes to their elements
      chunk_layout.py  how a dataset is cut into chunks: plain facts
    hdf5.py          the one thread that calls HDF5
    errors.py        what can be wrong with the bytes

Arrows: nyu_mat -> chunks, hdf5; chunks -> chunk_index -> chunk_codec, chunk_layout;
hdf5 -> chunk_layout; all -> errors. A helper process reads rows by `chunks`, without h5py.
"""

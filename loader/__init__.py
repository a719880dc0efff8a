"""A loader of batches for any dataset whose rows can be copied.

It needs numpy and torch, knows nothing of this project, and can be copied as it is. For a dataset
of your own write two methods:

    batch(indices)          the rows [B] in new memory, as a tuple of tensors
    fill(buffer, indices)   the same, written into the buffer (a memoryview of bytes): returns how
                            it lies there, a list of (dtype, shape) in the order of the tuple; or
                            None where that cannot be done, and `batch` is asked

and one function that says what a batch consists of: epoch -> arrays of row numbers. `arrays_in`
finds the places of a batch's parts in a buffer. Where rows come from a disk, a third method,
`read_ahead(indices)`, may begin to read those of later batches. Everything else is
`loader.loader.Loader`: a thread or processes that run ahead, buffers that are filled again only
after the last tensor on them is gone, resuming at any step (`set_epoch`), ends that are clean. With
`num_workers=2` two processes fill the buffers.

>>> import numpy as np, torch
>>> from loader.loader import Loader
>>> from loader.buffers import arrays_in
>>> class Squares:
...     table = np.arange(6, dtype=np.float32) ** 2  # in earnest: a memory map
...     def batch(self, indices):
...         return (torch.from_numpy(self.table[indices]),)
...     def fill(self, buffer, indices):
...         layout = [(self.table.dtype, (len(indices),))]
...         np.take(self.table, indices, out=arrays_in(buffer, layout)[0])
...         return layout
>>> loader = Loader(Squares(), lambda epoch: [np.array([0, 1, 2]), np.array([3, 4, 5]) - epoch])
>>> for epoch in range(2):
...     print([squares.tolist() for squares, in loader])
[[0.0, 1.0, 4.0], [9.0, 16.0, 25.0]]
[[0.0, 1.0, 4.0], [4.0, 9.0, 16.0]]

The files, from what you hold to what carries it:

    loader.py     Loader, an iteration over it, how many workers a loader needs
    batches.py    which rows a batch is of, and how it is made
    producers.py  who makes it: the caller, a thread
    workers.py    or worker processes
    buffers.py    four buffers that are used again and again
    messages.py   what a worker says of a batch
    ahead.py      which rows are asked for early: as long as a disk has to be waited for,
    disk.py       which the kernel counts
    forks.py      what a fork must not share
    threads.py    one of torch's threads for ours
    memory.py     the memory that is held, and what is left (NoRoom where it is too small)
"""

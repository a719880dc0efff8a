"""A loader of batches for any dataset whose rows can be copied: buffers used again and again, order from a function.

A dataset makes the batch of some rows in new memory (`batch`), or in a buffer that it is given (`fill`, which returns
how they lie there, or None where it cannot); what a batch consists of is a function from the epoch to arrays of row
numbers. Everything else (a thread or processes that run ahead, buffers that
are refilled only after the last tensor on them is gone, resuming, ends that are clean) is `loader.loader.Loader`.

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
>>> loader = Loader(Squares(), lambda epoch: [np.array([0, 1, 2]), np.array([3, 4, 5]) - epoch])  # num_workers=2
>>> for epoch in range(2):
...     print([squares.tolist() for squares, in loader])
[[0.0, 1.0, 4.0], [9.0, 16.0, 25.0]]
[[0.0, 1.0, 4.0], [4.0, 9.0, 16.0]]
"""

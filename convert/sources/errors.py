"""What can be wrong with the bytes of a source, before it is known whose they are.

Whoever knows the file, field and row says so to the user, as `shards.errors.DamagedSource`
(`convert.decode.blaming`).
"""


class Damaged(ValueError):
    """Bytes of the source that cannot be what was written there."""


class Unreadable(Exception):
    """HDF5 gave an error instead of data: the file may be damaged, or the library at fault."""


class BadRow(Exception):
    """What a row's bytes are: missing, empty, undecodable, of a wrong size or mode.

    The row fails, the others do not.
    """

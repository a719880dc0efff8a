"""What a user can mend, as a small tree: each error is one line, with its facts as attributes.

    UserError                 problem, right
      WrongSetting            name, given, choices      a value that no set or run can be made from
        NeedsSetting          other, needed             it goes with that value of another one alone
        ConflictingSettings   other, other_given        not with that value of another one
      MissingSet              path                      there is no finished set
        UnfinishedSet         path, n_shards_done       a conversion has begun there
      SeveralSets             path, found               more than one: which is meant?
      OldSet                  path, version, codecs     made by an earlier version, right as it is
      NewerSet                path, version             made by a later version
      DamagedSet              path                      bytes that are not what the manifest says
      OtherSet                path                      in its place lies another set
        OtherBytes            path                      an object of a store that is another one
      DifferentSets           path, other, what, ours, theirs    they cannot be read as one
      MissingField            path, field, fields
      WrongSource             source                    not what it should be, or not readable
        DamagedSource         source
      WrongPlace              path                      no room, no permission, no such folder
        RemoteSet             path, kind                on a mount, to be read row by row
      Busy                    path, who                 another process works there
      StoreFailed             full, gone                a mount or server that fails
        IncompleteCopy        missing                   a copy that is not whole
        IncompleteDownload                              a download that ended before its file

Errors say what is wrong and which value or act would be right. Which command to run next is the
command line's to add: whoever calls from Python has none to run. Settings are called as in Python,
`batch_size=64`; a command line has the same text told with its flags, `told(shards.flags.as_flag)`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from shards.addresses import name_of


def one_line(error: BaseException) -> str:
    """The text of any error, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def shown(value: Any) -> str:
    """What was given, for a message of one line."""
    return " ".join(str(value).split())[:80]


# What tells a terminal to do something, or turns the direction of a line: a name that a stranger
# gave may have it in.
STEERING = (
    *range(9),
    *range(11, 32),
    *range(127, 160),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
)
AS_ESCAPES = {code: ascii(chr(code))[1:-1] for code in STEERING}


def printable(text: str) -> str:
    """A text as a terminal may be given it: what would steer that is written as an escape."""
    return text.translate(AS_ESCAPES)


class Naming(Protocol):
    """How a text calls a setting: by its name alone, or with a value."""

    def __call__(self, name: str, value: Any = ..., /) -> str: ...


def as_argument(name: str, value: Any = ...) -> str:
    """As whoever calls from Python writes it: `batch_size`, `batch_size=64`."""
    return name if value is ... else f"{name}={value!r}"


def how_to_install(extra: str, package: str) -> str:
    """What gives a command that needs an extra what it lacks, as it is typed in any shell.

    package: the requirement of the extra that is absent; it may be named by itself where this
    project is on no index, which a clone of it need not be.
    """
    ours = f"pip install 'nyuv2-shards[{extra}]'"
    return f"Install the extra {extra}: {ours} (where that is on no index: pip install '{package}')"


class UserError(Exception):
    """A user's mistake or a broken input, in one line.

    problem: what is wrong. right: what would be right, "" where the problem says it.

    A subclass whose text names settings says it in `words`, from its facts, and gives
    `words(as_argument)` to this one's __init__.
    """

    def __init__(self, problem: str, right: str = "") -> None:
        super().__init__(problem, right)
        self.problem = problem
        self.right = right

    def words(self, naming: Naming) -> tuple[str, str]:
        """`problem` and `right`, with every setting called as `naming` calls it."""
        return self.problem, self.right

    def told(self, naming: Naming) -> str:
        """The text, with every setting called as `naming` calls it."""
        problem, right = self.words(naming)
        return f"{problem}. {right}" if right else problem

    def __str__(self) -> str:
        return self.told(as_argument)

    def __reduce__(self) -> tuple[Any, ...]:
        """With all its facts, whatever its __init__ takes: ranks and workers hand theirs on."""
        return _made_again, (type(self), self.args, self.__dict__)


def _made_again(kind: type[UserError], args: tuple[Any, ...], facts: dict[str, Any]) -> UserError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(facts)
    return error


class WrongSetting(UserError):
    """A value that nothing can be made from. `choices` says which can: "8 to 1024", "choose one of
    a, b".
    """

    def __init__(self, name: str, given: Any, choices: str) -> None:
        self.name = name
        self.given = given
        self.choices = choices
        super().__init__(*self.words(as_argument))

    def words(self, naming: Naming) -> tuple[str, str]:
        """The setting, what was given, what can be."""
        return f"{naming(self.name)} {shown(self.given)}: {self.choices}", ""


class NeedsSetting(WrongSetting):
    """A value that goes with the value `needed` of the setting `other`, and with no other one.

    advice: what to do; "" where adding that, or leaving this one out, is all.
    """

    def __init__(self, name: str, given: Any, other: str, needed: Any, advice: str = "") -> None:
        self.other = other
        self.needed = needed
        self.advice = advice
        super().__init__(name, given, f"for {as_argument(other, needed)} alone")

    def words(self, naming: Naming) -> tuple[str, str]:
        """What it is for."""
        needed = naming(self.other, self.needed)
        advice = self.advice or f"Add that, or leave {naming(self.name)} out"
        return f"{naming(self.name, self.given)} is for {needed}", advice


class ConflictingSettings(WrongSetting):
    """Two settings of which each is right by itself, and that do not go together."""

    def __init__(self, name: str, given: Any, other: str, other_given: Any) -> None:
        self.other = other
        self.other_given = other_given
        super().__init__(name, given, f"not together with {as_argument(other, other_given)}")

    def words(self, naming: Naming) -> tuple[str, str]:
        """Both of them."""
        other = naming(self.other, self.other_given)
        what = f"{naming(self.name, self.given)} does not go with {other}"
        return what, "Leave one of them out"


class PathError(UserError):
    """An error about something that has a path or an address."""

    def __init__(self, path: Any, problem: str, right: str = "", subject: str = "") -> None:
        """`subject`: what the sentence begins with, the path by itself otherwise."""
        super().__init__(f"{subject or path} {problem}", right)
        self.path = path


class MissingSet(PathError):
    """There is no finished set."""


class UnfinishedSet(MissingSet):
    """A conversion has begun there, and did not end."""

    def __init__(self, path: Any, n_shards_done: int) -> None:
        what = f"the conversion did not finish ({n_shards_done} shards are done)"
        super().__init__(path, what, subject=f"no manifest.json in {path}:")
        self.n_shards_done = n_shards_done


class SeveralSets(PathError):
    """More than one set lies there."""

    def __init__(self, path: Any, found: Sequence[Path | str]) -> None:
        names = ", ".join(map(name_of, found))
        UserError.__init__(self, f"{len(found)} sets under {path}: {names}", f"Use {found[0]}")
        self.path = path
        self.found = list(found)


class OldSet(PathError):
    """A set of an earlier version of the format: every byte of it is right.

    codecs: of a Zarr set, a field; None: .npy. unwritable: why nothing can be written beside its
    shards; "" where that is not known, or can be done.
    """

    def __init__(
        self, path: Any, version: int, codecs: dict[str, str] | None = None, unwritable: str = ""
    ) -> None:
        what = f"is a set of version {version} of the format, and right as it is"
        right = "It is brought to this version without decoding a row"
        if unwritable:
            what += f", but cannot be written to ({unwritable})"
            right = "Copy it to another disk: the copy is brought to this version, without decoding"
        super().__init__(path, what, right)
        self.version = version
        self.codecs = codecs
        self.unwritable = unwritable


class NewerSet(PathError):
    """A set of a later version of the format."""

    def __init__(self, path: Any, version: Any, newest: int) -> None:
        what = (
            f"is a set of version {shown(version)} of the format, this program reads up to {newest}"
        )
        super().__init__(path, what, "Use a newer version of this package")
        self.version = version


class DamagedSet(PathError):
    """Bytes that are not what the manifest says, or a manifest that no writer made."""


class OtherSet(PathError):
    """In its place lies another set."""


class OtherBytes(OtherSet):
    """An object of a store that holds other bytes than those that were to be written."""

    def __init__(self, path: Any) -> None:
        self.path = path
        UserError.__init__(self, *self.words(as_argument))

    def words(self, naming: Naming) -> tuple[str, str]:
        """That it stays, and what replaces it."""
        again = f"Convert it again with {naming('repair', True)}, or use another folder"
        return f"{self.path} holds other bytes already, which are kept", again


class DifferentSets(PathError):
    """Two sets that cannot be read as one. what: in which they differ."""

    def __init__(self, path: Any, other: Any, what: str, ours: Any, theirs: Any) -> None:
        problem = f"and {other} cannot be joined: {what} {ours} and {theirs}"
        super().__init__(path, problem, "Convert one of them again as the other")
        self.other = other
        self.what = what
        self.ours = ours
        self.theirs = theirs


class MissingField(PathError):
    """The set has no such field."""

    def __init__(self, path: Any, field: str, fields: Sequence[str]) -> None:
        super().__init__(path, f"has no field {field}", f"It has {', '.join(fields)}")
        self.field = field
        self.fields = tuple(fields)


class WrongSource(UserError):
    """A source that is not what it should be, or that cannot be read."""

    def __init__(self, source: Any, problem: str, right: str = "") -> None:
        super().__init__(f"{source}{problem if problem.startswith(':') else f' {problem}'}", right)
        self.source = source


class DamagedSource(WrongSource):
    """Bytes of a source that cannot be what was written there."""


class ChangedSource(WrongSource):
    """A source that somebody wrote to while it was read."""


class WrongPlace(PathError):
    """No room, no permission, or no such folder."""


class RemoteSet(WrongPlace):
    """A set on a mounted Drive, or on what else a service far away is mounted as.

    kind: of its file system, such as "fuse.drivefs". place: what that is, in words.
    """

    def __init__(self, path: Any, kind: str, place: str = "a mounted Drive") -> None:
        what = f"is on {place} ({kind})"
        super().__init__(path, f"{what}: training would read it over the network, row by row")
        self.kind = kind
        self.place = place


class Busy(PathError):
    """Another process works there."""

    def __init__(self, path: Any, problem: str, who: str, right: str = "") -> None:
        super().__init__(path, f"{problem} {who}", right)
        self.who = who


class CacheInUse(PathError):
    """Another training reads through a cache's folder, in an order of its own."""

    def __init__(self, path: Any, pid: int) -> None:
        what = f"is in use as a cache by another training, process {pid}"
        super().__init__(path, what, "Wait for it, or choose another folder")
        self.pid = pid


class StoreFailed(UserError):
    """A mount or a server that fails.

    full: it has no room, or a quota is used up. gone: it is not there, or not any more.
    """

    def __init__(
        self, problem: str, right: str = "", *, full: bool = False, gone: bool = False
    ) -> None:
        super().__init__(problem, right)
        self.full = full
        self.gone = gone


class IncompleteCopy(StoreFailed):
    """A copy that is not whole: not to be used, but copying again mends it.

    missing: the names of files that are not there, or short; empty where a file has other content.
    """

    def __init__(self, problem: str, right: str = "", *, missing: Sequence[str] = ()) -> None:
        super().__init__(problem, right)
        self.missing = tuple(missing)


class IncompleteDownload(StoreFailed):
    """A download that ended before its file; what came is kept, and the next one goes on."""

"""The classes of images: which there are, in what order, and by what names data know them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Classes:
    """What the outputs of a model stand for.

    Attributes:
        names: of the classes, in the order of the outputs.
        index: the number of each, by its name and by the other names that data may have for it.
        mapped: given by a class map: a split to evaluate may have images of some of them only.
    """

    names: list[str]
    index: dict[str, int]
    mapped: bool = False

    @classmethod
    def of(cls, names: Iterable[str]) -> "Classes":
        """Of data that have one name for each."""
        names = list(names)
        return cls(names, {name: i for i, name in enumerate(names)})

    def in_order_of(self, names: Sequence[str]) -> "Classes":
        """The same classes in another order."""
        place = {name: i for i, name in enumerate(names)}
        return Classes(list(names), {name: place[self.names[i]] for name, i in self.index.items()}, self.mapped)


def naturally(name: str) -> tuple[list[int | str], str]:
    """The key by which names are sorted: numbers as such, upper and lower case as one, as in timm; then as strings."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))], name


def read_class_map(path: str) -> Classes:
    """The classes of a file: a line of each, in order: its name, and after tabs the other names that data have for it.

    timm's class maps (.txt) are such files.

    Raises:
        ValueError: for a file that can't be read, an empty line, a name that comes twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.class_map={path!r}: can't be read: {error}") from error
    index: dict[str, int] = {}
    names = []
    for i, line in enumerate(lines):
        own, *others = (name.strip() for name in line.split("\t"))
        names.append(own)
        for name in dict.fromkeys((own, *filter(None, others))):
            if not name or name in index:
                problem = f"{name!r} is on line {index[name] + 1} too" if name else "it has no name"
                raise ValueError(f"data.class_map={path!r}: line {i + 1}: {problem}; a line names one class")
            index[name] = i
    return Classes(names, index, mapped=True)

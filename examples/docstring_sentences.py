"""A sentence-classification set made of what is on the machine: docstrings of Python libraries.

Each example is the first sentence of a docstring, and its label the library that it comes from. The
source files are parsed, never imported; the library's own name is taken out of its sentences, and
sentences that several libraries share are left out. The same installation gives the same data.

    python examples/docstring_sentences.py --output sentences   # train, validation, test .jsonl
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

# Import name of a library -> what its own sentences must not say.
LIBRARIES = {
    "pandas": r"pandas|pd|dataframes?",
    "torch": r"torch|pytorch|torchscript",
    "transformers": r"transformers?|hugging ?face",
    "sympy": r"sympy",
    "standard library": r"python|stdlib",
}
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "tests", "test", "idlelib", "lib2to3"}


def source_files(library: str) -> list[Path]:
    """The library's Python files, in an order that is arbitrary but always the same."""
    if library == "standard library":
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(library)
        if spec is None or spec.origin is None:
            return []
        root = Path(spec.origin).parent
    files = [
        path
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]
    return sorted(
        files, key=lambda path: hashlib.md5(path.relative_to(root).as_posix().encode()).digest()
    )


def first_sentences(path: Path) -> Iterator[str]:
    """The first sentence of every docstring in a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                paragraph = inspect.cleandoc(docstring).split("\n\n")[0]
                yield re.split(r"(?<=[a-z0-9)`\]])\.\s", paragraph + " ", maxsplit=1)[0]


def clean(sentence: str, own_name: str) -> str | None:
    """A sentence without markup and without the library's name; None if it is no plain prose."""
    sentence = re.sub(r":\w+:`~?([^`]*)`", r"\1", sentence)
    sentence = re.sub(r"\b(?:" + own_name + r")\b\.?", " ", sentence, flags=re.IGNORECASE)
    sentence = re.sub(r"[`*|]|\s+", " ", sentence)
    sentence = re.sub(r"\s+", " ", sentence).strip(" .")
    words = sentence.split()
    letters = sum(character.isalpha() or character.isspace() for character in sentence)
    is_prose = sentence[:1].isupper() and sentence.isascii() and letters >= 0.9 * len(sentence)
    return sentence if is_prose and 5 <= len(words) <= 30 else None


def build(
    train: int = 1000, validation: int = 100, test: int = 200, least: int = 300
) -> DatasetDict:
    """The data set: as many sentences of every library, in splits that share no source file.

    Args:
        train, validation, test: sentences per library in each split.
        least: libraries with fewer sentences than this in all are left out.

    Raises:
        RuntimeError: fewer than two libraries have sentences enough.
    """
    wanted = {"test": test, "validation": validation, "train": train}
    found: dict[str, dict[str, list[str]]] = {}
    owner: dict[str, str] = {}
    for library, own_name in LIBRARIES.items():
        splits: dict[str, list[str]] = {split: [] for split in wanted}
        for path in source_files(library):
            split = next((name for name, size in wanted.items() if len(splits[name]) < size), None)
            if split is None:
                break
            for raw in first_sentences(path):
                sentence = clean(raw, own_name)
                if sentence is None:
                    continue
                key = sentence.lower()
                if key not in owner:
                    splits[split].append(sentence)
                owner[key] = library if owner.setdefault(key, library) == library else "several"
        if sum(map(len, splits.values())) >= least:
            found[library] = splits
    if len(found) < 2:
        raise RuntimeError(
            f"Of {', '.join(LIBRARIES)}, only {', '.join(found) or 'none'} has {least} sentences. "
            "Install pandas and sympy, or pass data of your own with --data."
        )
    features = Features(sentence=Value("string"), label=ClassLabel(names=list(found)))
    unique = {
        library: {
            split: [text for text in texts if owner[text.lower()] == library]
            for split, texts in splits.items()
        }
        for library, splits in found.items()
    }
    data = DatasetDict()
    for split, size in reversed(wanted.items()):
        count = min(size, *(len(splits[split]) for splits in unique.values()))
        rows = [
            {"sentence": sentence, "label": number}
            for number, splits in enumerate(unique.values())
            for sentence in splits[split][:count]
        ]
        data[split] = Dataset.from_list(rows, features=features).shuffle(seed=0)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("sentences"), help="folder to write")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for split, rows in build().items():
        names = rows.features["label"].names
        named = rows.map(lambda row, names=names: {"name": names[row["label"]]})
        named.to_json(output / f"{split}.jsonl")
        print(f"{split}: {len(rows)} sentences of {', '.join(names)}")


if __name__ == "__main__":
    main()

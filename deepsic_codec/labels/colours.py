"""Colours of classes on maps."""

import colorsys
from collections.abc import Sequence

Colour = tuple[int, int, int]

GREY: Colour = (150, 150, 150)  # "unknown"
TURN = 0.61803398875  # of the colour circle between two classes: the golden ratio keeps any number of them apart
# Words in names of land cover, and the colours that maps usually give them. Each colour is given to one class.
COVER: dict[str, Colour] = {
    "forest": (20, 110, 40),
    "herbaceous": (150, 215, 105),
    "grass": (170, 225, 120),
    "pasture": (225, 225, 95),
    "annualcrop": (250, 190, 50),
    "permanentcrop": (205, 130, 35),
    "field": (235, 200, 80),
    "residential": (225, 60, 50),
    "town": (215, 60, 55),
    "urban": (205, 50, 75),
    "industrial": (165, 75, 190),
    "highway": (70, 65, 75),
    "river": (75, 195, 235),
    "lake": (30, 85, 205),
    "water": (60, 150, 230),
    "snow": (225, 245, 255),
    "bare": (190, 165, 135),
    "wet": (110, 175, 190),
    "wood": (45, 125, 55),
}


def colours(names: Sequence[str]) -> dict[str, Colour]:
    """Give each name a colour.

    Names of land cover get the colours of maps, "unknown" is grey, and other names get colours far from each other. The
    same names in the same order always get the same colours.
    """
    palette: dict[str, Colour] = {"unknown": GREY}
    others = 0
    for name in names:
        if name in palette:
            continue
        words = (word for word, colour in COVER.items() if word in name.lower() and colour not in palette.values())
        word = next(words, None)
        if word is not None:
            palette[name] = COVER[word]
            continue
        value, saturation = ((0.95, 0.85), (0.72, 0.95), (1.0, 0.55))[others % 3]
        red, green, blue = colorsys.hsv_to_rgb((0.02 + others * TURN) % 1, saturation, value)
        palette[name] = round(255 * red), round(255 * green), round(255 * blue)
        others += 1
    return {name: palette[name] for name in names}

"""The world of flux-mini: a scene is a short word on a coloured object before a coloured wall.

One description, `Scene`, is both drawn (`draw`) and told (`caption`), so an image and its caption cannot disagree.
Everything random comes from the `random.Random` that the caller owns.
"""

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from h2cache.eval.metrics.attributes import LAYOUTS

SIZE = 128
SUPERSAMPLING = 2

COLOURS = {
    "red": (205, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (250, 215, 60),
    "green": (40, 140, 65),
    "blue": (40, 85, 190),
    "purple": (120, 60, 160),
    "pink": (245, 160, 190),
    "brown": (115, 75, 45),
    "white": (245, 245, 240),
    "gray": (140, 142, 146),
    "black": (28, 28, 32),
}
SHAPES = ("round sign", "square sign", "octagonal sign", "diamond sign", "label", "jersey", "badge", "shopfront")
WALLS = ("plain", "brick", "striped")
FONTS = {"bold": "DejaVuSans-Bold.ttf", "serif": "DejaVuSerif-Bold.ttf"}

# Width and height (pixels of a 128 px image) that the word may take on each shape.
WORD_BOX = {
    "round sign": (90, 32),
    "square sign": (88, 34),
    "octagonal sign": (94, 34),
    "diamond sign": (84, 30),
    "label": (102, 36),
    "jersey": (78, 32),
    "badge": (78, 30),
    "shopfront": (108, 30),
}
LETTER_GRID = 4  # pixels of a cell of `letter_map`

WORDS = tuple(
    """STOP EXIT OPEN CAFE BEACH HOTEL PARK SHOP TAXI BANK BAR PIZZA BOOKS MUSIC STATION TEAM CLUB LONDON PARIS ROMA
    RONALDO MESSI SALE FREE NEW YORK CITY BUS STREET ROAD FIRE ICE CREAM COFFEE TEA BREAD FISH MEAT MARKET STORE GRILL
    DINER CINEMA THEATRE MUSEUM SCHOOL LIBRARY POLICE DOCTOR GARAGE MOTEL CASINO ARENA STADIUM UNITED KINGS QUEEN STAR
    SUN MOON RIVER LAKE OCEAN HARBOR BRIDGE GARDEN FLOWER APPLE LEMON CHERRY SUGAR HONEY WINE BEER ALE PUB INN DELI TACO
    SUSHI NOODLE CURRY BURGER SALAD SOUP SWEET CANDY TOYS GAMES SPORT GYM POOL SPA NAILS HAIR BARBER SALON FASHION SHOES
    JEANS HATS WATCH GOLD SILVER JEWEL GIFT CARDS PAPER PRINT PHOTO CAMERA VIDEO RADIO PHONE CABLE LIGHT LAMP TOOLS
    PAINT WOOD STEEL GLASS STONE BRICK HOUSE HOME LODGE CABIN CASTLE TOWER PALACE CHURCH TEMPLE MILL FARM RANCH BARN
    HORSE TIGER LION EAGLE HAWK WOLF BEAR BULL DUKE BOSS ROCK JAZZ BLUES SOUL DISCO DANCE PARTY LUCKY HAPPY SMILE DREAM
    POWER SPEED TURBO RACE RALLY MOTOR CYCLE BIKE BOAT SHIP FERRY TRAIN TRAM METRO PLANE AIR CARGO POST MAIL""".split()
)
# Held out of training: what the evaluation asks for must have been spelled, not remembered. The last three lines stand
# in pictures of CUTE80.
HELD_OUT_WORDS = tuple(
    """GATE CORNER PLAZA BAKERY GALAXY FALCON ZONE VILLA OASIS JUMBO KIOSK HERO WAX QUIZ MAPLE VISTA PEAK DOCK LOFT CARP
    BALLYS SEACREST SEOUL TERRY NAVAL COBRA WIGAN BAKER KNIGHT TORRES
    BURTON ESSIEN ARTETA KETCHUP DOLLARS
    CHELSEA WALCOTT ARSENAL BALLACK SINGHS""".split()
)


@dataclass(frozen=True)
class Scene:
    """One picture, in words. `shift` moves the object off the centre (pixels); captions do not tell it."""

    shape: str
    shape_colour: str
    word: str
    text_colour: str
    layout: str
    font: str
    wall: str
    wall_colour: str
    shift: tuple[int, int] = (0, 0)


def contrast(a: str, b: str) -> float:
    """Euclidean RGB distance of two named colours; below about 110 a shape drowns in its wall."""
    return math.dist(COLOURS[a], COLOURS[b])


def legible(text: str, ground: str) -> bool:
    """Letters are read by luminance (Rec. 601), which eyes and any VAE keep better than hue."""
    luma = [sum(w * c for w, c in zip((0.299, 0.587, 0.114), COLOURS[name], strict=True)) for name in (text, ground)]
    return abs(luma[0] - luma[1]) > 60


def random_word(rng: random.Random) -> str:
    """A vocabulary word, or (more often) a random string of 2 to 8 letters, never a held-out word."""
    if rng.random() < 0.4:
        return rng.choice(WORDS)
    while True:
        word = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(2, 8)))
        if word not in HELD_OUT_WORDS:
            return word


def random_scene(rng: random.Random, word: str | None = None) -> Scene:
    """Draw every attribute independently, colours under the constraint that they can be told apart."""
    names = list(COLOURS)
    shape_colour = rng.choice(names)
    text_colour = rng.choice([c for c in names if legible(c, shape_colour)])
    wall_colour = rng.choice([c for c in names if contrast(c, shape_colour) > 110])
    return Scene(
        shape=rng.choice(SHAPES),
        shape_colour=shape_colour,
        word=word or random_word(rng),
        text_colour=text_colour,
        layout=rng.choices(LAYOUTS, weights=(2, 1))[0],
        font=rng.choices(tuple(FONTS), weights=(3, 1))[0],
        wall=rng.choices(WALLS, weights=(3, 1, 1))[0],
        wall_colour=wall_colour,
        shift=(rng.randint(-3, 3), rng.randint(-3, 3)),
    )


PHRASINGS = (
    '{sign} that says "{word}" in {letters}{manner}, on {wall}',
    '{sign} with the word "{word}"{manner} in {letters} on {wall}',
    '"{word}" written{manner} in {letters} on {sign}, {wall}',
    'a photo of {sign} on {wall}, the text reads "{word}" in {letters}{manner}',
    '{sign} on {wall} with "{word}" written in {letters}{manner}',
    'in {letters}{manner}, the word "{word}" on {sign}, {wall}',
    'on {wall}, "{word}" in {letters}{manner} on {sign}',
    'a photo on {wall}, {sign} with the text "{word}"{manner} in {letters}',
)
HELD_OUT_PHRASINGS = (
    'on {wall}, {sign} that reads "{word}"{manner} in {letters}',
    'the text "{word}" in {letters}{manner}, a photo of {sign} with {wall}',
)


def caption(scene: Scene, rng: random.Random, phrasings: Sequence[str] = PHRASINGS) -> str:
    """The scene in one of `phrasings`; each tells shape, colours, word and (always when arched) layout."""
    wall = {
        "plain": f"{scene.wall_colour} background",
        "brick": f"{scene.wall_colour} brick wall",
        "striped": f"{scene.wall_colour} striped wall",
    }[scene.wall]
    manner = {"straight": " in a straight line", "arched": " in an arch"}[scene.layout]
    told = rng.random() < 0.7 or scene.layout == "arched"
    return rng.choice(phrasings).format(
        sign=with_article(f"{scene.shape_colour} {scene.shape}"),
        word=scene.word,
        letters=f"{scene.text_colour} {scene.font} letters",
        manner=manner if told else "",
        wall=with_article(wall),
    )


def with_article(thing: str) -> str:
    return ("an " if thing[0] in "aeiou" else "a ") + thing


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / FONTS[name]), size)


@cache
def _fitted(name: str, word: str, width: float, height: float) -> ImageFont.FreeTypeFont:
    """The largest font in which `word` is at most `width` wide and its capitals at most `height` tall (pixels)."""
    low, high = 8, 120
    while low < high:
        size = (low + high + 1) // 2
        left, top, right, bottom = _font(name, size).getbbox(word)
        fits = right - left <= width and bottom - top <= height
        low, high = (size, high) if fits else (low, size - 1)
    return _font(name, low)


def _shade(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return tuple(max(0, min(255, round(c * factor + (24 if factor > 1 else 0)))) for c in colour)


def _draw_wall(image: Image.Image, scene: Scene, s: int) -> None:
    pen, colour = ImageDraw.Draw(image), COLOURS[scene.wall_colour]
    darker = _shade(colour, 0.82) if sum(colour) > 150 else _shade(colour, 1.3)
    side = SIZE * s
    if scene.wall == "striped":
        for x in range(0, side, 16 * s):
            pen.rectangle((x, 0, x + 8 * s - 1, side), fill=darker)
    elif scene.wall == "brick":
        for row, y in enumerate(range(0, side, 16 * s)):
            pen.rectangle((0, y, side, y + 2 * s - 1), fill=darker)
            for x in range((row % 2) * 16 * s, side, 32 * s):
                pen.rectangle((x, y, x + 2 * s - 1, y + 16 * s), fill=darker)


def _draw_shape(pen: ImageDraw.ImageDraw, scene: Scene, cx: float, cy: float, s: int) -> None:
    fill = COLOURS[scene.shape_colour]
    edge = COLOURS[scene.text_colour]
    line = 3 * s

    def box(w: float, h: float, dy: float = 0) -> tuple[float, ...]:
        return cx - w * s / 2, cy - h * s / 2 + dy * s, cx + w * s / 2, cy + h * s / 2 + dy * s

    def polygon(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(cx + x * s, cy + y * s) for x, y in points]

    if scene.shape == "round sign":
        pen.ellipse(box(102, 102), fill=fill)
    elif scene.shape == "square sign":
        pen.rectangle(box(96, 96), fill=fill)
    elif scene.shape == "octagonal sign":
        angles = [math.pi / 8 + k * math.pi / 4 for k in range(8)]
        pen.polygon(polygon([(54 * math.cos(angle), 54 * math.sin(angle)) for angle in angles]), fill=fill)
    elif scene.shape == "diamond sign":
        pen.polygon(polygon([(0, -60), (60, 0), (0, 60), (-60, 0)]), fill=fill)
    elif scene.shape == "label":
        pen.rounded_rectangle(box(114, 58), radius=12 * s, fill=fill, outline=edge, width=line)
    elif scene.shape == "badge":
        pen.ellipse(box(104, 104), fill=fill)
        pen.ellipse(box(92, 92), outline=edge, width=line)
    elif scene.shape == "jersey":
        right = [(18, -50), (42, -44), (62, -14), (50, -2), (42, -12), (42, 54)]
        pen.polygon(polygon(right + [(-x, y) for x, y in reversed(right)]), fill=fill)
        pen.ellipse(box(34, 18, -50), fill=COLOURS[scene.wall_colour])
    else:  # shopfront: a signboard above a window under a striped awning
        pen.rectangle(box(116, 38, -34), fill=fill)
        pen.rectangle(box(108, 62, 24), fill=_shade(fill, 0.6))
        pen.rectangle(box(88, 36, 36), fill=(190, 215, 225))
        for k in range(6):
            left = cx + (-54 + 18 * k) * s
            pen.rectangle((left, cy - 14 * s, left + 18 * s, cy + 2 * s), fill=edge if k % 2 else fill)


@dataclass(frozen=True)
class Letter:
    """Where one letter stands, in pixels of the drawing: its box's middle, its advance and the capitals' height, and
    its turn clockwise in radians."""

    character: str
    x: float
    y: float
    width: float
    height: float
    angle: float


def _typeset(scene: Scene, s: float) -> tuple[ImageFont.FreeTypeFont, list[Letter]]:
    """The word's font and letters on a canvas of `SIZE * s` pixels."""
    width, height = WORD_BOX[scene.shape]
    lift = {"shopfront": 34, "jersey": 4}.get(scene.shape, 0)
    cx, cy = (SIZE / 2 + scene.shift[0]) * s, (SIZE / 2 + scene.shift[1] - lift) * s
    arched = scene.layout == "arched"
    if arched:
        width, height = width * 0.94, height * 0.72
    font = _fitted(scene.font, scene.word, width * s, height * s)
    _, top, _, bottom = font.getbbox("H")
    ends = [font.getlength(scene.word[:i]) for i in range(len(scene.word) + 1)]
    total, half = ends[-1], (bottom - top) / 2
    # On an arch each letter is turned by its place on a circle whose centre lies below the word.
    radius = max(total / 1.5, 30 * s)
    rise = radius * (1 - math.cos(total / radius / 2))
    letters = []
    for character, left, right in zip(scene.word, ends, ends[1:], strict=False):
        along = (left + right - total) / 2
        angle = along / radius if arched else 0.0
        x, y = cx + along, cy
        if arched:
            x = cx + radius * math.sin(angle)
            y = cy + radius * (1 - math.cos(angle)) - rise / 2 + (half - half * math.cos(angle)) * 0.5
        letters.append(Letter(character, x, y, right - left, 2 * half, angle))
    return font, letters


def _draw_word(image: Image.Image, scene: Scene, s: int) -> None:
    font, letters = _typeset(scene, s)
    colour = COLOURS[scene.text_colour]
    _, top, _, bottom = font.getbbox("H")
    if scene.layout == "straight":
        place = letters[0].x - letters[0].width / 2, letters[0].y - (top + bottom) / 2
        ImageDraw.Draw(image).text(place, scene.word, font=font, fill=colour)
        return
    for letter in letters:
        left, _, right, _ = font.getbbox(letter.character)
        pad = int(2 * max(right - left, bottom - top))
        tile = Image.new("L", (pad, pad), 0)
        place = pad / 2 - (left + right) / 2, pad / 2 - (top + bottom) / 2
        ImageDraw.Draw(tile).text(place, letter.character, font=font, fill=255)
        tile = tile.rotate(-math.degrees(letter.angle), resample=Image.Resampling.BICUBIC)
        corner = round(letter.x - pad / 2), round(letter.y - pad / 2)
        image.paste(Image.new("RGB", tile.size, colour), corner, tile)


def draw(scene: Scene) -> Image.Image:
    """The scene as a 128x128 RGB image, antialiased."""
    s = SUPERSAMPLING
    image = Image.new("RGB", (SIZE * s, SIZE * s), COLOURS[scene.wall_colour])
    _draw_wall(image, scene, s)
    cx, cy = (SIZE / 2 + scene.shift[0]) * s, (SIZE / 2 + scene.shift[1]) * s
    _draw_shape(ImageDraw.Draw(image), scene, cx, cy, s)
    _draw_word(image, scene, s)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def letter_boxes(scene: Scene) -> list[Letter]:
    """Where each letter of the word stands, in pixels of the 128 px image."""
    return _typeset(scene, 1)[1]


def letter_map(scene: Scene) -> Image.Image:
    """Which letter covers the middle of each 4x4 pixel cell: a 32x32 "L" image, 0 for none, 1 for A, ... 26 for Z."""
    cells = Image.new("L", (SIZE, SIZE), 0)
    pen = ImageDraw.Draw(cells)
    for letter in letter_boxes(scene):
        c, n = math.cos(letter.angle), math.sin(letter.angle)
        corners = [(dx * letter.width / 2, dy * letter.height / 2) for dx, dy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        outline = [(letter.x + x * c - y * n, letter.y + x * n + y * c) for x, y in corners]
        pen.polygon(outline, fill=1 + string.ascii_uppercase.index(letter.character))
    return cells.resize((SIZE // LETTER_GRID,) * 2, Image.Resampling.NEAREST)

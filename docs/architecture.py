"""Draw ``docs/images/architecture.svg``, a training step of SpidR: ``python docs/architecture.py``."""

import math
import random
from pathlib import Path

WIDTH, HEIGHT = 960, 470
INK, SOFT, STUDENT, TEACHER, CODES = "#1f2933", "#8895a7", "#2563a8", "#8a5a12", "#2f7d4f"
PALE = {STUDENT: "#e4eef8", TEACHER: "#f8efdd", CODES: "#e3f3e8", SOFT: "#eef1f4"}
LAYERS = ("layer 12", "layer 11", "⋮", "layer 5", "⋮", "layer 1")
CODEBOOKS = ("8", "7", "⋮", "1")

parts: list[str] = []


def text(
    x: float, y: float, words: str, *, size: int = 14, colour: str = INK, anchor: str = "middle", weight: int = 400
) -> None:
    """Write a line of text at ``x``."""
    parts.append(
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="{anchor}">'
        f"{words}</text>"
    )


def box(x: float, y: float, width: float, height: float, colour: str, *lines: str, size: int = 14) -> None:
    """Draw a rounded box with centred lines of text."""
    parts.append(
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{PALE[colour]}" '
        f'stroke="{colour}" stroke-width="1.4"/>'
    )
    for i, line in enumerate(lines):
        text(x + width / 2, y + height / 2 + 5 + 18 * (i - (len(lines) - 1) / 2), line, size=size)


def arrow(*points: tuple[float, float], colour: str = INK, dashed: bool = False) -> None:
    """Draw a line through points, with a head at its end."""
    path = " ".join(f"{'M' if i == 0 else 'L'}{x:g},{y:g}" for i, (x, y) in enumerate(points))
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    parts.append(
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash} '
        f'marker-end="url(#head-{colour[1:]})"/>'
    )


def waveform(x: float, y: float, width: float) -> None:
    """Draw something that looks like speech."""
    random.seed(3)
    points = []
    for i in range(int(width)):
        t = i / width
        loudness = 26 * abs(math.sin(3.1 * math.pi * t)) * (0.35 + 0.65 * math.sin(math.pi * t))
        points.append(f"{x + i:g},{y + loudness * random.uniform(-1, 1):.1f}")
    parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{INK}" stroke-width="0.9"/>')


def frames(x: float, y: float, masked: set[int]) -> None:
    """Draw a row of frames, the masked ones dark."""
    for i in range(12):
        fill, line = (SOFT, SOFT) if i in masked else ("#ffffff", SOFT)
        parts.append(
            f'<rect x="{x + 11 * i:g}" y="{y:g}" width="9" height="22" fill="{fill}" stroke="{line}" stroke-width="1"/>'
        )


def stack(x: float, y: float, colour: str, name: str, note: str) -> list[float]:
    """Draw a transformer. Returns the y positions of the layers with a codebook, from the top."""
    text(x + 80, y - 24, name, size=15, colour=colour, weight=600)
    text(x + 80, y - 8, note, size=12, colour=SOFT)
    for i, label in enumerate(LAYERS):
        box(x, y + 24 * i, 160, 20, colour, label, size=12)
    return [y + 24 * i + 10 for i in range(len(CODEBOOKS))]


def draw() -> str:
    """Draw the whole picture."""
    waveform(24, 235, 120)
    text(84, 290, "waveform, 16 kHz", size=12, colour=SOFT)
    arrow((150, 235), (172, 235))
    box(174, 196, 118, 78, SOFT, "convolutions,", "projection")
    text(233, 290, "50 frames a second", size=12, colour=SOFT)

    # The teacher sees all frames, the student only unmasked ones.
    arrow((292, 220), (312, 220), (312, 120), (330, 120))
    arrow((292, 250), (312, 250), (312, 364), (330, 364))
    frames(334, 109, set())
    frames(334, 353, {2, 3, 4, 8, 9})
    text(400, 150, "all frames", size=12, colour=SOFT)
    text(400, 394, "some frames masked", size=12, colour=SOFT)
    arrow((468, 120), (492, 120))
    arrow((468, 364), (492, 364))
    teacher = stack(494, 62, TEACHER, "teacher", "no gradient")
    student = stack(494, 306, STUDENT, "student", "trained")
    arrow((516, 270), (516, 210), colour=TEACHER, dashed=True)
    text(524, 230, "moving average", size=12, colour=TEACHER, anchor="start")
    text(524, 245, "of the weights", size=12, colour=TEACHER, anchor="start")

    # Codebooks above, heads below, the loss between them.
    for number, high, low in zip(CODEBOOKS, teacher, student, strict=True):
        arrow((654, high), (700, high), colour=TEACHER)
        arrow((654, low), (700, low), colour=STUDENT)
        box(702, high - 10, 96, 20, CODES, "⋮" if number == "⋮" else f"codebook {number}", size=12)
        box(702, low - 10, 96, 20, STUDENT, "⋮" if number == "⋮" else f"head {number}", size=12)
    text(750, 52, "clustered online", size=12, colour=SOFT)
    box(836, 201, 104, 54, SOFT, "cross-entropy", "masked frames", size=12)
    arrow((798, 98), (888, 98), (888, 199), colour=CODES)
    arrow((798, 342), (888, 342), (888, 257), colour=STUDENT)
    text(896, 140, "nearest", size=12, colour=CODES, anchor="start")
    text(896, 155, "codeword", size=12, colour=CODES, anchor="start")
    text(896, 296, "predicted", size=12, colour=STUDENT, anchor="start")
    text(896, 311, "codeword", size=12, colour=STUDENT, anchor="start")
    text(750, 416, "the argmax of a head", size=12, colour=SOFT)
    text(750, 431, "is the frame&#8217;s unit", size=12, colour=SOFT)

    heads = "".join(
        f'<marker id="head-{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto">'
        f'<path d="M0,0 L10,5 L0,10 z" fill="{colour}"/></marker>'
        for colour in (INK, STUDENT, TEACHER, CODES)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" role="img">'
        "<title>SpidR: a student predicts, for masked frames, the codewords of its teacher's layers</title>"
        f'<defs>{heads}</defs><rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    (Path(__file__).parent / "images" / "architecture.svg").write_text(draw(), encoding="utf-8")

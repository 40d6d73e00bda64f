"""The page of a report: one self-contained HTML file."""

import base64
import io
import wave
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spidr.report.figures import GRID, INK, MUTED, SERIES, Drawn

DARK_SERIES = ("#56b4e9", "#ff9a52", "#2fce9f", "#e8a3cb", "#f0e442", "#a999f5", "#8fd6f2", "#ef8f73")

STYLE = f"""
:root {{ color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  --page: #ffffff; --card: #f7f8fa; --ink: {INK}; --muted: {MUTED}; --grid: {GRID};
  {" ".join(f"--s{i}: {colour};" for i, colour in enumerate(SERIES))} }}
@media (prefers-color-scheme: dark) {{ :root {{
  --page: #14161a; --card: #1d2026; --ink: #e8eaed; --muted: #a2a8b2; --grid: #383d46;
  {" ".join(f"--s{i}: {colour};" for i, colour in enumerate(DARK_SERIES))} }} }}
body {{ margin: 0 auto; max-width: 1080px; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 var(--font); }}
h1 {{ font-size: 1.5rem; margin: 0; }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
p {{ margin: .3rem 0; }} .note {{ color: var(--muted); }}
figure {{ margin: 0; padding: .5rem; background: var(--card); border-radius: 8px; overflow-x: auto; }}
svg {{ display: block; width: 100%; height: auto; min-width: 640px; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }}
details td {{ text-align: left; white-space: normal; overflow-wrap: anywhere; }}
th:first-child, td:first-child {{ text-align: left; }} th {{ color: var(--muted); font-weight: 500; }}
.wide {{ overflow-x: auto; }} details {{ margin: .3rem 0; }} summary {{ cursor: pointer; }}
"""


class Page:
    """Sections of text, tables and figures, in the order in which they are added."""

    def __init__(self, title: str) -> None:
        self.title, self._parts = title, [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str, look_for: str = "") -> None:
        """Begin a section, optionally with a line on what to look for."""
        self._parts.append(f"<h2>{escape(text)}</h2>")
        if look_for:
            self.text(look_for, note=True)

    def text(self, text: str, *, note: bool = False) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p{' class=note' if note else ''}>{escape(text)}</p>")

    def figure(self, drawn: Drawn, description: str) -> None:
        """Add a figure; the description is for screen readers."""
        self._parts.append(f'<figure role="img" aria-label="{escape(description)}">{drawn.svg}</figure>')

    def sound(self, waveform: NDArray[Any], sample_rate: int) -> None:
        """Add a player of a waveform, scaled to the full range."""
        samples = (waveform / max(float(np.abs(waveform).max()), 1e-9) * 32_000).astype("<i2")
        file = io.BytesIO()
        with wave.open(file, "wb") as wav:
            wav.setnchannels(1)
            wav.setsampwidth(2)
            wav.setframerate(sample_rate)
            wav.writeframes(samples.tobytes())
        content = base64.b64encode(file.getvalue()).decode()
        self._parts.append(f'<p><audio controls src="data:audio/wav;base64,{content}"></audio></p>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, folded: str = "") -> None:
        """Add a table; if ``folded`` under a title, it opens on a click."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        table = f'<div class="wide"><table>{head and f"<tr>{head}</tr>"}{body}</table></div>'
        self._parts.append(f"<details><summary>{escape(folded)}</summary>{table}</details>" if folded else table)

    def html(self) -> str:
        """The complete HTML."""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head><body>\n"
            + "\n".join(self._parts)
            + "\n</body></html>\n"
        )

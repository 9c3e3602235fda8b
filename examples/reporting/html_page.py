"""The report as one HTML page: no script, no request, readable narrow and wide, light and dark."""

from __future__ import annotations

import re
from html import escape

from examples.reporting.content import Content, Section
from examples.reporting.figures import Figure
from examples.reporting.provenance import environments
from examples.reporting.svg import CLASSES, VARIABLES
from examples.reporting.tables import Table

# On a narrow page every row of a table becomes a block, each cell behind its column's name.
STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;color-scheme:light dark}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main,header{max-width:84rem;margin:0 auto;padding:0 clamp(.75rem,3vw,2rem)}
h1{font-size:1.7rem;line-height:1.2;margin:1.6rem 0 .3rem}
h2{font-size:1.3rem;margin:2.6rem 0 .6rem;padding-top:.6rem;border-top:2px solid var(--rule)}
h3{font-size:1.05rem;margin:1.6rem 0 .2rem}
h1,h2,h3,li,summary,p,figcaption{overflow-wrap:anywhere}
th,td{overflow-wrap:break-word}
p{margin:.2rem 0 .8rem;max-width:52rem}
.note,figcaption{color:var(--dim);font-size:.86rem}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;padding:0;margin:.4rem 0}
a{color:var(--s0)}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.34rem .55rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--rule)}
thead th{background:var(--panel);border-bottom:2px solid var(--dim);vertical-align:bottom}
td:first-child,th:first-child,table.words td,table.words th{text-align:left}
tbody tr:hover{background:var(--panel)}
.figures{display:grid;gap:1.4rem;margin-top:1rem;align-items:start;
grid-template-columns:repeat(auto-fill,minmax(min(100%,25rem),1fr))}
figure{margin:0;padding:.7rem;border:1px solid var(--rule);border-radius:.4rem;min-width:0}
figure h3{margin:0 0 .4rem}
figure svg,figure img{display:block;width:100%;height:auto}
figure img{background:#fff}
details{margin-top:.3rem}
summary{cursor:pointer}
details ul{margin:.2rem 0;padding-left:1.1rem}
@media(max-width:70rem){
table,tbody,tr,th[scope=row],td{display:block}
thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
tr{border:1px solid var(--rule);border-radius:.4rem;padding:.4rem .6rem;margin:0 0 .7rem}
tbody th[scope=row]{background:none;padding:.1rem 0 .3rem;font-size:.95rem}
td,table.words td{display:flex;justify-content:space-between;gap:1rem;padding:.16rem 0;border:0}
td::before{content:attr(data-label);color:var(--dim);text-align:left;flex:0 1 40%}
}
@media print{details{display:none}}
"""


def page(content: Content) -> str:
    """The whole page."""
    links = "".join(f'<li><a href="#{_id(s)}">{escape(s.title)}</a></li>' for s in content.sections)
    body = "\n".join(_section(section) for section in content.sections)
    title = escape(content.title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title>
<style>{VARIABLES}{CLASSES}{STYLE}</style>
</head>
<body>
<header><h1>{title}</h1><p>{escape(content.counts)}</p><nav><ul>{links}</ul></nav></header>
<main>
{body}
</main>
</body>
</html>
"""


def _id(section: Section) -> str:
    return "s-" + "".join(c if c.isalnum() else "-" for c in section.title)


def _section(section: Section) -> str:
    parts = [f'<section id="{_id(section)}"><h2>{escape(section.title)}</h2>']
    parts += [_table(table) for table in section.tables]
    if section.figures:
        shown = "\n".join(_figure(figure) for figure in section.figures)
        parts.append(f'<div class="figures">\n{shown}\n</div>')
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    rows = []
    for first, *cells in table.rows:
        row = f'<tr><th scope="row">{escape(first)}</th>'
        for name, cell in zip(table.header[1:], cells, strict=True):
            row += f'<td data-label="{escape(name)}">{_cell(cell)}</td>'
        rows.append(row + "</tr>")
    words = ' class="words"' if table.header[1:] in (["why"], ["what"]) else ""
    body = "\n".join(rows)
    return (
        f'<h3>{escape(table.title)}</h3>\n<p class="note">{escape(table.note)}</p>\n'
        f"<table{words}><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    )


def _cell(text: str) -> str:
    """A sign stays with its deviation, and what is in brackets together.

    A line may break before the sign, or tables of twelve columns would be wider than a screen.
    """
    text = text.replace(" ± ", " ±\u00a0")
    return escape(re.sub(r"\([^)]*\)", lambda found: found[0].replace(" ", "\u00a0"), text))


def _figure(figure: Figure) -> str:
    title = escape(figure.title)
    shown = figure.svg
    if figure.png:
        shown = f'<img alt="{title}" src="data:image/png;base64,{figure.base64}">'
    names = "".join(f"<li>{escape(name)}</li>" for name in _names(figure))
    where = "".join(f"<li>{escape(text)}</li>" for text in environments(figure.runs))
    count = len(_names(figure))
    summary = f"{count} run{'' if count == 1 else 's'}" if figure.runs else "Read from"
    ran = f"{summary}; versions, machine and checkout" if figure.runs else summary
    return (
        f"<figure><h3>{title}</h3>\n{shown}\n<figcaption>{escape(figure.note)}"
        f"<details><summary>{ran}</summary><ul>{where}</ul><ul>{names}</ul></details>"
        "</figcaption></figure>"
    )


def _names(figure: Figure) -> list[str]:
    return [*dict.fromkeys(run.name for run in figure.runs), *figure.others]

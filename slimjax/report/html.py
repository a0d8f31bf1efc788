"""One self-contained report.html: no network, no other file; light, dark and print."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from slimjax.records import Record
from slimjax.report.samples import Spread
from slimjax.report.tables import Table

CSS = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1a1b1e;--soft:#5c626b;--line:#d9dce1;--row:#f5f6f8;--accent:#2563b8}
@media (prefers-color-scheme:dark){:root{--ground:#15171b;--ink:#e6e8eb;--soft:#9aa2ad;--line:#343942;
 --row:#1c1f25;--accent:#7db3ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:2rem 1.25rem 4rem;background:var(--ground);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .25rem}h2{font-size:1.2rem;margin:2.4rem 0 .6rem}
p.facts{color:var(--soft);margin:0 0 1.2rem}ul{padding-left:1.2rem}li{margin:.35rem 0;max-width:64rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.42rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:bottom}
td{vertical-align:top;white-space:nowrap}
th{font-weight:600;border-bottom-width:2px}th.text,td.text{text-align:left}
td.text{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.95em}
td.remark{white-space:normal;text-align:left;color:var(--soft)}
tbody tr:hover{background:var(--row)}.none{color:var(--soft)}
th button{all:unset;cursor:pointer;color:inherit}th button:hover{color:var(--accent)}
th button:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
th[aria-sort=ascending] button::after{content:" \\25B4"}th[aria-sort=descending] button::after{content:" \\25BE"}
p.note{color:var(--soft);font-size:.86rem;margin:.5rem 0 0}
figure{margin:1rem 0}figure svg{height:auto;max-width:100%}
figcaption{color:var(--soft);font-size:.86rem}
details{border-top:1px solid var(--line);padding:.6rem 0}summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font-size:.8rem;line-height:1.4;background:var(--row);padding:.8rem;border-radius:4px}
@media print{:root{--ground:#fff;--ink:#000;--soft:#444;--line:#bbb;--row:#fff}
 body{max-width:none;padding:0;font-size:10pt}table{font-size:7pt}th,td{padding:.2rem .25rem}
 td{white-space:normal}h2{break-after:avoid}.screen{display:none}.scroll{overflow:visible}figure,tr{break-inside:avoid}pre{white-space:pre-wrap}}
"""

SORT = """
document.querySelectorAll("th button").forEach(button=>button.onclick=()=>{
  const head=button.parentElement,body=head.closest("table").tBodies[0],column=head.cellIndex;
  const up=head.getAttribute("aria-sort")!=="ascending",sign=up?1:-1;
  const value=row=>row.cells[column]?.dataset.value??"";
  head.parentElement.querySelectorAll("th").forEach(other=>other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort",up?"ascending":"descending");
  [...body.rows].sort((a,b)=>{const x=value(a),y=value(b);
    if(x===""||y==="")return (x==="")-(y==="");
    return sign*(isNaN(x)||isNaN(y)?x.localeCompare(y):x-y)}).forEach(row=>body.append(row))});
"""


Part = Table | tuple[str, str]


def html(
    *,
    title: str,
    facts: str,
    findings: Sequence[str],
    parts: Sequence[Part],
    config: str,
    records: Sequence[Record],
) -> str:
    """The page. facts: one line below the title; parts: tables and plots, (caption, <svg> element); config: JSON."""
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings)
    provenance = [
        json.dumps({"cell": dict(record.cell), "status": record.status, **record.provenance})
        for record in records
    ]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{CSS}</style></head><body>",
            f'<h1>{escape(title)}</h1><p class="facts">{escape(facts)}</p>',
            f"<h2>Findings</h2><ul>{sentences or '<li>Nothing is measured yet.</li>'}</ul>",
            *(_table(part) if isinstance(part, Table) else _figure(*part) for part in parts),
            "<h2>Where this comes from</h2>",
            *([_details("Configuration", config)] if config else []),
            _details("Provenance of each record", "\n".join(provenance)),
            f"<script>{SORT}</script></body></html>\n",
        ]
    )


def _table(table: Table) -> str:
    forms = ["text" if column.form == "text" else "number" for column in table.columns]
    heads = "".join(
        f'<th class="{form}" scope="col"><button type="button">{escape(column.title)}</button></th>'
        for form, column in zip(forms, table.columns, strict=True)
    )
    rows, below = [], []
    for index, (row, texts) in enumerate(zip(table.rows, table.written(), strict=True)):
        cells = [_cell(*cell) for cell in zip(row, texts, forms, strict=True)]
        remark, room = table.remark(index), len(row) - table.labels
        if remark and table.empty(index):
            cells[table.labels :] = [f'<td class="remark" colspan="{room}">{escape(remark)}</td>']
        elif remark:  # beside numbers there is no room for it
            below.append(f'<p class="note">{escape(table.name(index))}: {escape(remark)}</p>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{''.join(below)}"
        f'<p class="note">{escape(table.note)} <span class="screen">Click a title to sort.</span></p>'
    )


def _cell(value: Any, text: str, form: str) -> str:
    number = value.mean if isinstance(value, Spread) else value
    raw = "" if number is None else escape(str(number))
    return f'<td class="{form}{" none" if value is None else ""}" data-value="{raw}">{escape(text)}</td>'


def _figure(caption: str, svg: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _details(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"

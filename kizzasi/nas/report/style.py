"""How report.html looks, and the one script that it runs: hover, touch, and tables that sort."""

PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #16191d; --soft: #56606a; --rule: #e1e5ea; --paper: #fff;
  --ground: #f4f6f8; --winner: #c7254e; --proxy: #2766d9; --random: #b86e00; --preset: #2b8a5f;
  --outside: #8a4fbf; --searched: #2766d9; --baseline: #98a2ad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #9aa5b1; --rule: #2c333b;
  --paper: #181c21; --ground: #101317; --winner: #ff6b8b; --proxy: #6ea4ff; --random: #f0a740;
  --preset: #54c795; --outside: #c08cf0; --searched: #6ea4ff; --baseline: #5f6b77; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 27px; line-height: 1.25; letter-spacing: -.015em; margin: 0 0 10px;
  overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 12px; letter-spacing: -.005em; }
.verdict { font-size: 18px; line-height: 1.45; max-width: 75ch; margin: 0 0 18px;
  overflow-wrap: anywhere; }
section, figure, .fold { background: var(--paper); border: 1px solid var(--rule);
  border-radius: 12px; padding: 20px 22px; margin: 0 0 18px; min-width: 0; }
.fold > summary h2 { display: inline; }
.fold[open] > summary { margin-bottom: 16px; }
.fold section, .fold figure { border: 0; padding: 6px 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(500px, 100%), 1fr));
  gap: 0 18px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 18px; }
.cards p { margin: 0; padding: 12px 18px; background: var(--paper); color: var(--soft);
  border: 1px solid var(--rule); border-radius: 12px; font-size: 13px; }
.cards b { display: block; color: var(--ink); font-size: 21px; font-weight: 620;
  font-variant-numeric: tabular-nums; }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 0 0 18px; }
a { color: var(--searched); }
.commands { margin: 0 0 18px; font-size: 13px; color: var(--soft); }
ul { margin: 0; padding-left: 20px; } li { margin: 0 0 6px; max-width: 90ch; }
figcaption, .note { color: var(--soft); font-size: 13px; margin: 10px 0 0; }
.scroll { overflow-x: auto; }
.swipe { display: none; }
@media (max-width: 580px) { .commands { white-space: pre-wrap; }
  .swipe { display: block; color: var(--soft); font-size: 12px; margin: 4px 0 0; } }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { color: var(--soft); font-weight: 550; white-space: nowrap; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--searched); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
.number + td:not(.number), .number + th:not(.number) { padding-left: 14px; }
td { overflow-wrap: break-word; }
.won td { color: var(--winner); font-weight: 600; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; margin: 0; }
pre { overflow-x: auto; font-size: 12px; } summary { cursor: pointer; }
#hint { position: fixed; z-index: 1; max-width: min(340px, 90vw); padding: 8px 12px;
  font-size: 13px; background: var(--ink); color: var(--paper); border-radius: 8px;
  pointer-events: none; white-space: pre-line; }
#hint[hidden] { display: none; }
[data-about] { cursor: pointer; }
"""

SCRIPT = """
"use strict";
const hint = document.getElementById("hint");
function show(event) {
  const mark = event.target.closest("[data-about]");
  if (!mark) { hint.hidden = true; return; }
  hint.textContent = mark.dataset.about;
  hint.hidden = false;
  const box = hint.getBoundingClientRect();
  hint.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  hint.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 8)) + "px";
}
document.addEventListener("pointermove", show);
document.addEventListener("click", show);
function value(row, column) {
  const text = row.cells[column].textContent.trim();
  const found = text.replace(/,/g, "").match(/^([-+]?[\\d.]+)([kMGT]?)B?(\\s.*)?$/);
  if (!found) return [1, text];
  return [0, parseFloat(found[1]) * {"": 1, k: 1e3, M: 1e6, G: 1e9, T: 1e12}[found[2]]];
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), column = head.cellIndex;
    const up = head.ariaSort !== "ascending";
    for (const other of table.querySelectorAll("th")) other.ariaSort = "none";
    head.ariaSort = up ? "ascending" : "descending";
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const [kind, x] = value(a, column), [other, y] = value(b, column);
      if (kind !== other) return kind - other;
      const order = kind ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    });
    table.tBodies[0].append(...rows);
  });
}
"""

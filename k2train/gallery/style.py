"""Style of the galleries: that of the report, and what lists, columns and marked words need.

- A change is seen without color: what is new has a line below, what is gone a dotted one.
- One column on a phone; in print only what is shown, without controls.
"""

from k2train.report.style import CSS

OWN = """
:root { --new: #d5f0db; --gone: #fbdcdc; --hit: #fff2a8; --same: #e6eef7; }
@media screen and (prefers-color-scheme: dark) { :root:not([data-theme=light]) { --new: #1d4428;
 --gone: #5a2626; --hit: #5c5216; --same: #223246; } }
body { max-width: 1400px; padding-bottom: 1rem; }
nav a, nav strong { margin-right: 1rem; } a { color: var(--info); }
[hidden] { display: none; }
form { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: .6rem 0;
 font-size: .9rem; } form label { display: inline-flex; gap: .35rem; align-items: center; }
input, select, button { font: inherit; color: var(--text); background: var(--card);
 border: 1px solid var(--soft); border-radius: 5px; padding: .2rem .5rem; max-width: 100%; }
input[type=search] { width: 12rem; } button { cursor: pointer; }
#columns { display: contents; }
:focus-visible { outline: 2px solid var(--info); outline-offset: 1px; }
main { display: grid; grid-template-columns: minmax(230px, 320px) minmax(0, 1fr); gap: 1.2rem; }
#list { height: calc(100vh - 2rem); overflow-y: auto; position: sticky; top: 1rem;
 border: 1px solid var(--line); border-radius: 6px; } .space { position: relative; }
.row { position: absolute; left: 0; right: 0; height: 46px; display: flex; align-items: center;
 gap: .45rem; padding: 0 .6rem; border-bottom: 1px solid var(--line); cursor: pointer;
 font-size: .86rem; } .row[aria-selected=true] { background: var(--same); font-weight: 600; }
.row .number { color: var(--soft); min-width: 1.6rem; text-align: right; }
.row .text { flex: 1; overflow: hidden; white-space: nowrap; text-overflow: ellipsis;
 unicode-bidi: isolate; }
.badge { font-size: .74rem; font-weight: normal; border: 1px solid currentColor;
 border-radius: 9px; padding: 0 .4rem; color: var(--soft); white-space: nowrap; }
.badge.changed, .badge.partly { color: var(--warn); } .badge.right { color: var(--good); }
.badge.wrong { color: var(--bad); }
@media print, (prefers-color-scheme: light) { .badge.changed, .badge.partly { color: #a64b00; } }
.said { white-space: break-spaces; overflow-wrap: anywhere; unicode-bidi: isolate;
 background: var(--card); border-radius: 6px; padding: .5rem .7rem; margin: .3rem 0;
 font: .86rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
.said.prompt { border-left: 4px solid var(--info); } .said.tall { max-height: 16rem;
 overflow-y: auto; } .none { color: var(--soft); } .note { margin: .2rem 0; font-size: .85rem; }
ins, del, mark { color: inherit; background: none; text-decoration: none; }
.added { background: var(--new); text-decoration: underline; }
.removed { background: var(--gone); text-decoration: underline dotted; }
.blank { text-decoration: none; } #shown > h2:first-child { margin-top: 0; }
.hit { background: var(--hit); outline: 1px solid var(--warn); }
.verbatim { border-bottom: 2px dotted var(--c7); }
details.verbatim { border: 0; } .verbatim ul { margin: .2rem 0 .6rem; padding-left: 1.2rem;
 font-size: .84rem; overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 1rem;
 margin: .8rem 0; } .column { min-width: 0; } .column h3 { font-size: .95rem; }
.strip { display: flex; flex-wrap: wrap; gap: 2px; margin: .8rem 0; }
.cell { width: 20px; height: 22px; padding: 0; font-size: .72rem; line-height: 1;
 border: 1px solid var(--line); border-radius: 3px; }
.cell.chosen { border: 2px solid var(--text); font-weight: 700; color: #ffffff; }
.hue0 { background: #2b6cb0; } .hue1 { background: #b7521e; } .hue2 { background: #0b7a5c; }
.hue3 { background: #a0457f; } .hue4 { background: #7a5f00; } .hue5 { background: #6a4fb3; }
.cell.absent, .cell.unknown { background: var(--card); } .cell.absent.chosen,
 .cell.unknown.chosen { color: var(--text); }
.cell.right { background: #2e7d32; } .cell.wrong { background: #c62828; border-radius: 10px; }
.cell.partly { background: #a64b00; }
.entry { content-visibility: auto; contain-intrinsic-size: auto 90px; margin: .7rem 0; }
.choices { width: 100%; table-layout: fixed; } .choices td { white-space: normal; padding: .15rem
 .3rem .15rem 0; } .choices .said { margin: 0; padding: .2rem .4rem; } caption { text-align: left;
 color: var(--soft); font-size: .8rem; } td.says { width: 4.2rem; font-size: .8rem; }
td.value { width: 4rem; text-align: right; } td.share { width: 5rem; } meter { width: 100%; }
tr.answered { font-weight: 700; } .chart .begin { text-anchor: start; }
#trace { margin-bottom: .7rem; }
figure.chart { max-width: 640px; margin: .6rem 0; } header { margin-bottom: .8rem; }
svg .letter { font-weight: 700; fill: var(--text); }
dialog { color: var(--text); background: var(--page); border: 1px solid var(--soft);
 border-radius: 8px; } dialog h2 { margin-top: 0; }
 dialog::backdrop { background: #00000080; }
kbd { border: 1px solid var(--soft); border-radius: 4px; padding: 0 .35rem; font-size: .85em; }
@media (max-width: 560px) { .chart svg text { font-size: 17px; } }
@media (max-width: 760px) { main { grid-template-columns: minmax(0, 1fr); } #list { height: 11rem;
 position: static; } input[type=search] { width: 100%; } form label { flex-wrap: wrap; } }
@media print { form, #list, nav, dialog { display: none; } main { display: block; }
 .said { background: none; border: 1px solid var(--line); }
 .entry { content-visibility: visible; } }
"""
STYLE = CSS + OWN

"""Style of the report: light and dark, narrow and printed; paper is always light.

- On a wide screen the numbers of a figure stand beside it and scroll; the script folds them on a
  narrow one. Paper has the figures alone.
- Colors of curves are those of Okabe and Ito, which people with any kind of color vision tell
  apart; the dark set is lighter.
"""

CSS = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1b1f24; --soft: #5b6570;
 --line: #d8dee4; --card: #f6f8fa; --c1: #0072b2; --c2: #d55e00; --c3: #009e73; --c4: #cc79a7;
 --c5: #8a6d00; --c6: #3b8fc4; --c7: #6a4fb3; --c8: #4d4d4d; --bad: #c62828; --good: #2e7d32;
 --warn: #ef6c00; --info: #1565c0; }
@media screen and (prefers-color-scheme: dark) { :root:not([data-theme=light]) { --page: #14181d;
 --text: #e6e9ec; --soft: #9aa5b1; --line: #333b44; --card: #1d232a; --c1: #58b4ea; --c2: #ff9a52;
 --c3: #3fd0a0; --c4: #e6a3c7; --c5: #f0e442; --c6: #a8d4f0; --c7: #b8a1f0; --c8: #c0c0c0;
 --bad: #ff6b6b; --good: #6bd47a; --warn: #ffb74d; --info: #64b5f6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 1.5rem 1rem 4rem; background: var(--page);
 color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .2rem; } small, .note, .status { color: var(--soft); }
h3 small { font-weight: normal; } .status { margin: .2rem 0 1rem; }
.warning { border-left: 4px solid var(--warn); padding: .3rem .7rem; background: var(--card); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .6rem;
 margin: 0; } .tiles div { background: var(--card); border-radius: 6px; padding: .5rem .7rem; }
.tiles dt { color: var(--soft); font-size: .82rem; } .tiles dd { margin: 0; font-size: 1.15rem;
 font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
figure { margin: 1rem 0 1.6rem; break-inside: avoid; position: relative; }
svg { width: 100%; height: auto; display: block; overflow: visible; touch-action: pan-y; }
svg:focus-visible { outline: 2px solid var(--info); }
svg text { font-size: 12px; fill: var(--soft); } .end { text-anchor: end; }
.middle { text-anchor: middle; } .grid { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke-width: 1.6; } .thin { stroke-width: 1; opacity: .6; }
polygon { stroke: none; opacity: .25; } .faint { opacity: .35; }
.cursor { stroke: var(--soft); stroke-dasharray: 3 3; }
.c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
.c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); } .c6 { stroke: var(--c6); }
.c7 { stroke: var(--c7); } .c8 { stroke: var(--c8); }
polygon.c1, circle.c1 { fill: var(--c1); } polygon.c2, circle.c2 { fill: var(--c2); }
polygon.c3, circle.c3 { fill: var(--c3); } polygon.c4, circle.c4 { fill: var(--c4); }
polygon.c5, circle.c5 { fill: var(--c5); } polygon.c6, circle.c6 { fill: var(--c6); }
polygon.c7, circle.c7 { fill: var(--c7); } polygon.c8, circle.c8 { fill: var(--c8); }
rect.strip.undone { opacity: .45; }
rect.mark { fill: var(--soft); } rect.line { opacity: .6; } rect.band { opacity: .1; }
rect.benign { fill: var(--good); } rect.open { fill: var(--c4); }
rect.malignant, rect.skipped { fill: var(--bad); } rect.level { fill: var(--c7); }
rect.return { fill: var(--warn); opacity: .8; } rect.restart { fill: var(--info); }
rect.deferral { fill: var(--warn); } rect.change { fill: var(--c3); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: 0; padding: 0;
 font-size: .85rem; color: var(--soft); }
.legend i { display: inline-block; width: 14px; height: 0; border-top: 3px solid var(--soft);
 margin-right: .35rem; vertical-align: middle; }
i.c1 { border-color: var(--c1); } i.c2 { border-color: var(--c2); }
i.c3 { border-color: var(--c3); }
i.c4 { border-color: var(--c4); } i.c5 { border-color: var(--c5); }
i.c6 { border-color: var(--c6); }
i.c7 { border-color: var(--c7); } i.c8 { border-color: var(--c8); }
.legend i.mark { border-width: 10px; border-top-width: 10px; width: 4px; opacity: .6; }
i.benign { border-color: var(--good); } i.malignant, i.skipped { border-color: var(--bad); }
i.level { border-color: var(--c7); } i.return, i.deferral { border-color: var(--warn); }
i.restart { border-color: var(--info); } i.open { border-color: var(--c4); }
i.change { border-color: var(--c3); }
.switch { position: sticky; top: 0; z-index: 1; display: flex; gap: 1rem; align-items: center;
 margin: 0 0 .6rem; padding: .35rem 0; border: 0; background: var(--page); font-size: .9rem; }
.switch[hidden] { display: none; } .switch legend { float: left; padding: 0; color: var(--soft); }
.switch label { cursor: pointer; } .switch input { margin: 0 .3rem 0 0; vertical-align: -1px; }
output { display: block; min-height: 1.4em; font-size: .85rem; color: var(--soft);
 font-variant-numeric: tabular-nums; }
details { margin: .3rem 0; } summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
.wide { overflow: auto; max-height: 34rem; } table { border-collapse: collapse; font-size: .86rem;
 font-variant-numeric: tabular-nums; } th, td { text-align: left; padding: .2rem .7rem .2rem 0;
 white-space: nowrap;
 border-bottom: 1px solid var(--line); vertical-align: top; } thead th { color: var(--soft);
 position: sticky; top: 0; background: var(--page);
 font-weight: 600; white-space: nowrap; } tbody th { font-weight: normal; }
td:last-child { white-space: normal; min-width: 7rem; overflow-wrap: anywhere; }
.numbers table { border-collapse: separate; border-spacing: 0; }
.numbers td { text-align: right; white-space: nowrap; min-width: 0; }
.numbers thead th + th { text-align: right; white-space: normal; vertical-align: bottom; }
.numbers thead th { vertical-align: bottom; }
.numbers ul { font-size: .82rem; padding-left: 1.1rem; color: var(--soft); }
@media screen and (min-width: 1200px) { body { max-width: 1400px; }
 figure { padding-right: 23rem; } .numbers > summary { display: none; }
 .numbers { position: absolute; top: 0; right: 0; bottom: 0; width: 22rem; margin: 0;
 overflow: auto; padding-left: 1rem; border-left: 1px solid var(--line); }
 .numbers .wide { overflow: visible; max-height: none; }
 .numbers tbody th { position: sticky; left: 0; background: var(--page); } }
.bar { display: flex; height: 22px; border-radius: 4px; overflow: hidden; background: var(--card); }
.bar span { min-width: 1px; } .s-useful { background: var(--good); }
.s-redone { background: var(--bad); } .s-skipped { background: var(--c2); }
.s-saving { background: var(--c1); } .s-evaluating { background: var(--c3); }
.s-starting { background: var(--c5); } .s-other { background: var(--soft); }
.s-down { background: var(--line); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: .3rem; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dl.facts dt { color: var(--soft); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--card); padding: .8rem; border-radius: 6px;
 font-size: .82rem; }
@media (max-width: 560px) { body { padding: 1rem .6rem 3rem; } svg text { font-size: 23px; }
 dl.facts { grid-template-columns: 1fr; } dl.facts dd { margin-bottom: .4rem; } }
@media print { :root { color-scheme: light; }
 body { max-width: none; padding: 0; font-size: 11px; } output { display: none; }
 h2 { break-after: avoid; } .switch, .numbers, details:not([open]) { display: none; }
 .wide { overflow: visible; max-height: none; } table { font-size: 8.5px; }
 th, td { padding-right: .4rem; }
 .bar, .bar span, .key, i, .tiles div { print-color-adjust: exact; } }
"""

"""The style sheet of the report. One accent colour; light and dark follow the reader's system."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1d2125; --soft: #5f676e; --faint: #c3c8cc; --rule: #e8eaec; --wash: #f6f7f8;
  --accent: #0b7285; --accent-2: #5aa9b6; --accent-3: #aed4da; --bad: #b3401a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e6e8ea; --soft: #9aa3ab; --faint: #4d555c; --rule: #282d32; --wash: #1b1f23;
    --accent: #4fc0d0; --accent-2: #2f8593; --accent-3: #1f525b; --bad: #ff9466;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main, header, footer { max-width: 68rem; margin: 0 auto; padding: 0 clamp(1.25rem, 5vw, 3rem); }
h1, h2, h3, p, ul, dl, dd, figure, table { margin: 0; padding: 0; }
h1 { font-size: clamp(1.75rem, 5vw, 2.5rem); line-height: 1.15; font-weight: 600; letter-spacing: -.02em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.375rem; font-weight: 600; letter-spacing: -.01em; margin: 0 0 1.5rem; }
h3 { font-size: 1rem; font-weight: 600; }
header { padding-top: clamp(2.5rem, 7vw, 4.5rem); }
section { margin-top: clamp(3rem, 7vw, 4.5rem); }
.eyebrow { color: var(--soft); font-size: .875rem; margin-bottom: .5rem; }
.sub { color: var(--soft); margin-top: .75rem; }
.status { display: inline-flex; align-items: center; gap: .5rem; margin-top: 1.25rem; font-weight: 500; }
.status::before { content: ""; width: .625rem; height: .625rem; border-radius: 50%; background: var(--soft); }
.status.good::before { background: var(--accent); }
.status.bad::before { background: var(--bad); }
.reason { color: var(--soft); margin-top: .25rem; max-width: 46rem; overflow-wrap: anywhere; white-space: pre-line; }
.hero { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1.25rem; margin-top: 2.5rem;
  font-size: clamp(2.75rem, 10vw, 4.5rem); line-height: 1.05; letter-spacing: -.035em; font-weight: 300; }
.hero .after { color: var(--accent); font-weight: 500; }
.hero .arrow { color: var(--faint); }
.hero .gain { font-size: 1.125rem; line-height: 1.4; letter-spacing: 0; font-weight: 500; }
.hero-label { color: var(--soft); margin-top: .5rem; }
.stats { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: 1.75rem 2rem;
  margin-top: 3rem; padding-top: 2rem; border-top: 1px solid var(--rule); }
.stats dt { color: var(--soft); font-size: .875rem; }
.stats dd { font-size: 1.5rem; font-weight: 500; letter-spacing: -.015em; line-height: 1.3; }
.stats dd small { font-size: .875rem; font-weight: 400; letter-spacing: 0; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 3.5rem 4rem; }
.charts .wide { grid-column: 1 / -1; }
@media (max-width: 52rem) { .charts { grid-template-columns: minmax(0, 1fr); gap: 3rem; } }
figure { min-width: 0; display: flex; flex-direction: column; }
figcaption { margin-bottom: auto; }
figcaption p, .note { color: var(--soft); font-size: .9375rem; line-height: 1.5; margin-top: .25rem; max-width: 44rem; }
figure h4 { margin: 1.25rem 0 0; font-size: .8125rem; font-weight: 500; color: var(--soft); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-top: .875rem;
  font-size: .8125rem; color: var(--soft); }
.legend li { display: inline-flex; align-items: center; gap: .5rem; }
.key { display: inline-block; width: 1.125rem; height: 0; border-top: 2px solid currentColor; }
.key.fill { width: .6875rem; height: .6875rem; border: 0; border-radius: 2px; background: currentColor; }
.key.dots { width: .5625rem; height: .5625rem; border: 0; border-radius: 50%; background: currentColor; }
.plot { display: grid; grid-template-columns: auto minmax(0, 1fr); margin-top: 1.25rem; font-size: .75rem;
  line-height: 1; color: var(--soft); }
.plot .area { position: relative; height: 15rem; }
.plot.short .area { height: 6.5rem; }
.wide .plot .area { height: clamp(15rem, 32vw, 20rem); }
.plot svg { display: block; position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot .y { position: relative; width: calc(var(--y) + .75rem); }
.plot .y span { position: absolute; right: .75rem; transform: translateY(50%); white-space: nowrap; }
.plot .x { grid-column: 2; position: relative; height: 1.5rem; }
.plot .x span { position: absolute; top: .625rem; transform: translateX(-50%); white-space: nowrap; }
.plot .tag { position: absolute; right: 0; margin-bottom: .3125rem; color: var(--ink); }
.plot .tag.upright { right: auto; margin: 0 0 0 .5rem; white-space: nowrap; }
.plot.gantt { font-size: .6875rem; }
.wide .plot.gantt .area { height: auto; border-left: 1px solid var(--rule); }
.plot.gantt .y + .area + .y, .plot.gantt .y + .area + .y + .area { margin-top: .75rem; }
.plot.gantt .version { position: absolute; top: -.875rem; transform: translateX(-50%); color: var(--ink); }
svg .published { stroke: var(--ink); stroke-width: 1; opacity: .55; }
svg .loaded { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 2 3; opacity: .55; }
.key.dashed { border-top: 2px dotted var(--ink); }
.bottleneck { margin-top: 2.25rem; padding-left: 1rem; border-left: 3px solid var(--accent); max-width: 44rem;
  font-size: 1.125rem; line-height: 1.5; }
.shares { margin-top: 1rem; display: grid; gap: .875rem; font-size: .875rem; }
.share { display: grid; grid-template-columns: 8rem minmax(0, 1fr) minmax(0, 1.4fr); gap: 0 1.25rem;
  align-items: center; color: var(--soft); }
.share b { font-weight: 500; color: var(--ink); }
.share .bar { display: flex; height: .75rem; background: var(--wash); }
.share .bar i { background: currentColor; }
@media (max-width: 52rem) { .share { grid-template-columns: 7rem minmax(0, 1fr); } .share span:last-child {
  grid-column: 1 / -1; } }
.plot .count { position: absolute; transform: translateX(-50%); padding-bottom: .375rem; color: var(--ink); }
svg path { fill: none; vector-effect: non-scaling-stroke; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--faint); stroke-width: 1; }
svg .bound { stroke: var(--ink); stroke-width: 1.25; stroke-dasharray: 4 4; }
svg .line { stroke: currentColor; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .dots { stroke: currentColor; stroke-width: 8; stroke-linecap: round; }
svg .line.faint { stroke-width: 1.25; }
svg .fill { fill: currentColor; }
svg rect { fill: currentColor; }
.accent { color: var(--accent); } .accent-2 { color: var(--accent-2); } .accent-3 { color: var(--accent-3); }
.ink { color: var(--ink); } .muted { color: var(--soft); } .faint { color: var(--faint); } .bad { color: var(--bad); }
.empty { color: var(--soft); background: var(--wash); border-radius: .5rem; padding: 1.25rem; margin-top: 1rem;
  font-size: .9375rem; flex: 1; }
.equation { font-size: clamp(1.0625rem, 2.6vw, 1.375rem); line-height: 1.6; display: flex; flex-wrap: wrap;
  gap: 0 .75rem; }
.equation span { white-space: nowrap; }
.equation b { font-weight: 600; }
.equation i { font-style: normal; color: var(--soft); font-size: .875em; }
.equation .op { color: var(--faint); }
.verdict { margin-top: .75rem; font-weight: 500; }
.violations { margin: .75rem 0 0 1.25rem; color: var(--bad); overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
caption { text-align: left; color: var(--soft); font-size: .875rem; padding-bottom: .5rem; }
th, td { text-align: left; padding: .5rem 1rem .5rem 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: break-word; }
th { font-weight: 500; color: var(--soft); font-size: .875rem; }
td.n, th.n { text-align: right; white-space: nowrap; overflow-wrap: normal; }
td.why { overflow-wrap: anywhere; }
td.key-name { white-space: nowrap; padding-right: 2rem; }
td.n:last-child, th.n:last-child { padding-right: 0; }
.account table { margin-top: 1.75rem; }
details { border-top: 1px solid var(--rule); }
details:last-of-type { border-bottom: 1px solid var(--rule); }
summary { cursor: pointer; padding: 1rem 0; font-weight: 500; }
summary:focus-visible, .scroll:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 3px; border-radius: 2px;
}
.scroll { overflow: auto; max-height: 32rem; margin-bottom: 1.5rem; }
.scroll th { position: sticky; top: 0; background: var(--paper); white-space: nowrap; }
.scroll.numbers td, .scroll.numbers th { white-space: nowrap; font-size: .875rem; padding-right: 1.25rem; }
code { font: .875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: .875rem; padding-top: 3rem; padding-bottom: 3.5rem; }
@media print { details { display: none; } section { break-inside: avoid; } }
"""

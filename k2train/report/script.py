"""Script of the report: another axis for all figures, and the values under the pointer.

- It needs no library and asks for nothing over the network. Without it the page lacks the switch
  of the axis and the values under the pointer: the tables have them.
- The numbers of a figure are folded where they have no room beside it, until somebody opens them.
- The axis is kept while `--watch` loads the page again.
"""

SCRIPT = """
const axes = JSON.parse(document.getElementById("axes").textContent);
const names = { step: "step", tokens: "tokens", time: "time" };
const along = (from, to, x) => {
  if (x <= from[0]) return to[0];
  let low = 0, high = from.length - 1;
  if (x >= from[high]) return to[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (from[middle] <= x) low = middle; else high = middle;
  }
  const share = (x - from[low]) / ((from[high] - from[low]) || 1);
  return to[low] + share * (to[high] - to[low]);
};
const value = (run, axis, step) =>
  axis === "step" ? step : along(axes[run].step, axes[run][axis], step);
const short = x => {
  for (const [unit, size] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["K", 1e3]])
    if (Math.abs(x) >= size) return +(x / size).toPrecision(6) + unit;
  return String(+x.toPrecision(6));
};
const units = [["days", 172800, 86400], ["hours", 7200, 3600], ["minutes", 120, 60]];
const unitOf = high => units.find(([, least]) => high >= least) || ["seconds", 0, 1];
const ticksOf = (low, high, count) => {
  let step = 10 ** Math.floor(Math.log10(Math.max(high - low, 1e-9) / count));
  step *= [1, 2, 5, 10].find(factor => (high - low) / (step * factor) <= count);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high * (1 + 1e-9); n++)
    found.push(+(n * step).toPrecision(12));
  return found;
};
const beside = matchMedia("(min-width: 1200px)");
const fold = () => {
  for (const numbers of document.querySelectorAll(".numbers")) numbers.open = beside.matches;
};
fold();
beside.addEventListener("change", fold);
const figures = [];
for (const figure of document.querySelectorAll("figure")) {
  const data = figure.querySelector("script[type='application/json']");
  const svg = figure.querySelector("svg"), said = figure.querySelector("output");
  if (!data || !svg) continue;
  const found = JSON.parse(data.textContent), cursor = svg.querySelector(".cursor");
  const [low, high] = found.range, [start, stop] = found.pixels;
  const stepAt = pixel => low + (pixel - start) / (stop - start) * (high - low);
  const shapes = [...svg.querySelectorAll("polyline, polygon, circle, rect.mark")].map(shape => ({
    shape,
    run: +(shape.closest("g[data-run]")?.dataset.run || 0),
    points: shape.getAttribute("points")?.split(" ").map(pair => pair.split(",").map(Number)),
    x: +(shape.getAttribute("cx") || shape.getAttribute("x")),
    width: +shape.getAttribute("width"),
  }));
  const still = { ticks: [...svg.querySelectorAll(".tick")] };
  still.y = still.ticks.length ? still.ticks[0].getAttribute("y") : 0;
  const set = axis => {
    const runs = [...new Set(found.curves.map(c => c.run))];
    const least = Math.min(...runs.map(run => value(run, axis, low)));
    const most = Math.max(...found.curves.map(c => value(c.run, axis, Math.max(...c.x))),
      axis === "step" ? high : least);
    const [unit, , size] = axis === "time" ? unitOf(most) : [names[axis], 0, 1];
    const at = (run, step) =>
      start + (value(run, axis, step) - least) / ((most - least) || 1) * (stop - start);
    const place = (run, pixel) => Math.min(stop, Math.max(start, at(run, stepAt(pixel))));
    for (const { shape, run, points, x, width } of shapes) {
      if (points) shape.setAttribute("points",
        points.map(([px, py]) => place(run, px).toFixed(1) + "," + py).join(" "));
      else if (shape.tagName === "circle") shape.setAttribute("cx", place(run, x).toFixed(1));
      else {
        shape.setAttribute("x", place(run, x).toFixed(1));
        const wide = place(run, x + width) - place(run, x);
        shape.setAttribute("width", width > 1.5 ? Math.max(1.5, wide).toFixed(1) : width);
      }
    }
    for (const tick of svg.querySelectorAll(".tick")) tick.remove();
    for (const tick of ticksOf(least / size, most / size, 8)) {
      const text = document.createElementNS(svg.namespaceURI, "text");
      text.setAttribute("class", "middle tick");
      const share = (tick * size - least) / ((most - least) || 1);
      text.setAttribute("x", start + share * (stop - start));
      text.setAttribute("y", still.y);
      text.textContent = short(tick);
      svg.append(text);
    }
    svg.querySelector(".axis").textContent =
      axis === "time" ? unit + " of training" : unit;
    for (const curve of found.curves) curve.at = curve.x.map(step => at(curve.run, step));
    places = [...new Set(found.curves.flatMap(c => c.at))].sort((a, b) => a - b);
    shown = places.length - 1;
    hide();
  };
  let places = [], shown = 0;
  const nearest = (list, at) => {
    let best = 0;
    list.forEach((x, i) => { if (Math.abs(x - at) < Math.abs(list[best] - at)) best = i; });
    return best;
  };
  const hide = () => {
    cursor.setAttribute("visibility", "hidden");
    said.textContent = "";
  };
  const show = at => {
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", "visible");
    const far = c => Math.abs(c.at[nearest(c.at, at)] - at);
    const under = found.curves.reduce((a, b) => far(b) < far(a) ? b : a);
    const step = under.x[nearest(under.at, at)];
    const seconds = value(under.run, "time", step), [unit, , size] = unitOf(seconds);
    const values = found.curves.map(c => {
      const i = nearest(c.at, at);
      return Math.abs(c.at[i] - at) > 12 ? null : c.name + " " + c.y[i];
    }).filter(Boolean);
    said.textContent = "step " + step.toLocaleString("en") + ", "
      + short(+value(under.run, "tokens", step).toPrecision(4)) + " tokens, "
      + +(seconds / size).toPrecision(3) + " " + unit + ": " + values.join(", ");
  };
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    shown = nearest(places, at);
    show(places[shown]);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    shown = Math.min(places.length - 1, Math.max(0, shown + by));
    show(places[shown]);
  });
  figures.push(set);
}
const keep = { get: () => null, set: () => null };
try {
  keep.get = () => sessionStorage.getItem("axis");
  keep.set = axis => sessionStorage.setItem("axis", axis);
  keep.get();
} catch {
  // A page from a file may have no storage: the axis is then steps again.
  keep.get = keep.set = () => null;
}
const form = document.querySelector(".switch");
const change = axis => {
  for (const set of figures) set(axis);
  keep.set(axis);
};
if (form) {
  form.hidden = false;
  const wanted = keep.get();
  for (const input of form.querySelectorAll("input")) {
    input.checked = input.value === (wanted in names ? wanted : "step");
    input.addEventListener("change", () => change(input.value));
    if (input.checked) change(input.value);
  }
}
"""

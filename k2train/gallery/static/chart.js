"use strict";
// A chart of lines over training steps, with its numbers in a table below.
const chart = (() => {
  const { element } = texts;
  const WIDTH = 560, HEIGHT = 200, LEFT = 64, RIGHT = 14, TOP = 24, BOTTOM = 28;
  const MOST_LINES = 8;

  function svg(tag, facts, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(facts)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // A number that is not finite is a string, such as "-Infinity".
  const short = value => Number(Number(value).toPrecision(3)).toLocaleString("en");

  // `lines` are { name, values } with a value or null for each checkpoint; `chosen` are marked.
  function lines(title, checkpoints, given, chosen) {
    const drawn = given.slice(0, MOST_LINES);
    const values = drawn.flatMap(line => line.values).filter(Number.isFinite);
    const box = element("figure", "chart");
    if (!values.length) return box;
    const steps = checkpoints.map(one => one.step);
    const low = Math.min(...values), high = Math.max(...values);
    const left = steps[0], right = steps[steps.length - 1];
    const x = step => LEFT + (right > left ? (step - left) / (right - left) : 0.5) * (WIDTH - LEFT - RIGHT);
    const y = value => TOP + (high > low ? (high - value) / (high - low) : 0.5) * (HEIGHT - TOP - BOTTOM);

    const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
    for (const value of high > low ? [low, (low + high) / 2, high] : [low]) {
      picture.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
      picture.append(svg("text", { class: "end", x: LEFT - 8, y: y(value) + 4 }, short(value)));
    }
    for (const step of right > left ? [left, right] : [left]) {
      const side = step === right && right > left ? "end" : "begin";
      picture.append(svg("text", { class: side, x: x(step), y: HEIGHT - 8 }, `step ${step.toLocaleString("en")}`));
    }
    chosen.forEach((n, column) => {
      const at = x(steps[n]);
      picture.append(svg("line", { class: "cursor", x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM }));
      picture.append(svg("text", { class: "middle letter", x: at, y: TOP - 6 }, "ABCDEF"[column]));
    });
    drawn.forEach((line, n) => {
      const points = line.values.map((value, at) => [value, at]).filter(pair => Number.isFinite(pair[0]));
      const places = points.map(([value, at]) => `${x(steps[at]).toFixed(1)},${y(value).toFixed(1)}`);
      picture.append(svg("polyline", { class: `c${n + 1}`, points: places.join(" ") }));
      for (const place of points.length > 40 ? [] : places) {
        const [cx, cy] = place.split(",");
        picture.append(svg("circle", { class: `c${n + 1}`, cx, cy, r: 3 }));
      }
    });
    box.append(element("h3", "", title), picture, legend(drawn, given.length), table(checkpoints, drawn));
    return box;
  }

  function legend(drawn, all) {
    const list = element("ul", "legend");
    drawn.forEach((line, n) => {
      const entry = element("li");
      entry.append(element("i", `c${n + 1}`), element("span", "", line.name));
      list.append(entry);
    });
    if (all > drawn.length) list.append(element("li", "", `and ${all - drawn.length} more, not drawn`));
    return list;
  }

  // Its rows are made when it is opened.
  function table(checkpoints, drawn) {
    const box = element("details");
    box.append(element("summary", "", "Numbers"));
    box.addEventListener("toggle", () => {
      if (box.querySelector("table")) return;
      const wide = element("div", "wide"), made = element("table");
      made.append(row("th", ["checkpoint", "step", ...drawn.map(line => line.name)]));
      checkpoints.forEach((one, n) => {
        const cells = drawn.map(line => (line.values[n] === null ? "-" : short(line.values[n])));
        made.append(row("td", [one.name, one.step.toLocaleString("en"), ...cells]));
      });
      wide.append(made);
      box.append(wide);
    });
    return box;
  }

  function row(tag, cells) {
    const made = element("tr");
    made.append(...cells.map(cell => element(tag, "", cell)));
    return made;
  }

  return { lines };
})();

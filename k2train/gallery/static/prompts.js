"use strict";
// Page of prompts: each prompt down the checkpoints, chosen ones side by side.
(async () => {
  const { element, block, difference, has, hits, pattern } = texts;
  const { byId } = controls;
  const index = await gallery.load("prompts");
  const { prompts, answers, checkpoints } = index;
  const search = byId("search"), show = byId("show"), mark = byId("mark");
  const shown = byId("shown"), status = byId("status");
  let chosen = [], current = 0, kept = [], found = null, loaded = null, turns = 0;

  const sight = controls.whenInSight();
  const fileOf = n => `prompt_${String(n + 1).padStart(4, "0")}`;
  const first = () => chosen[0], last = () => chosen[chosen.length - 1];

  // Whether the first and the last column answered differently: 1, 0, or -1 where one has not.
  function differs(n) {
    const a = answers[n][first()], b = answers[n][last()];
    return a < 0 || b < 0 ? -1 : Number(a !== b);
  }

  const FILTERS = {
    all: () => true,
    changed: n => differs(n) === 1,
    same: n => differs(n) === 0,
    missing: n => differs(n) === -1,
  };

  const list = controls.makeList(byId("list"), (row, at) => {
    const n = kept[at];
    row.append(element("span", "number", n + 1));
    const text = element("span", "text", prompts[n].replace(/\s+/g, " ").slice(0, 160) || "(nothing)");
    text.dir = "auto";
    row.append(text);
    const state = differs(n);
    const name = state === 1 ? "changed" : state === 0 ? "same" : "missing";
    row.append(element("span", `badge ${name}`, name));
  }, at => {
    current = kept[at];
    update(false);
  });

  // Texts of a prompt that are searched: itself, and its answers once they are loaded.
  function matches(n) {
    return has(prompts[n], found) || Boolean(loaded && loaded[n].texts.some(t => has(t.text, found)));
  }

  function countHits() {
    const count = loaded
      ? loaded.reduce((sum, one) => sum + one.texts.filter(t => has(t.text, found)).length, 0) : 0;
    return loaded ? `, ${count.toLocaleString("en")} distinct answers with it` : ", loading answers";
  }

  function update(again = true) {
    if (again) {
      const filter = FILTERS[show.value] || FILTERS.all;
      kept = prompts.map((_, n) => n).filter(n => filter(n) && (!found || matches(n)));
      if (kept.length && !kept.includes(current)) current = kept[0];
    }
    list(kept.length, kept.indexOf(current));
    status.textContent = `${kept.length.toLocaleString("en")} of ${prompts.length.toLocaleString("en")} `
      + `prompts, ${checkpoints.length} checkpoints${found ? countHits() : ""}`;
    controls.writeAddress([
      ["prompt", current + 1], ...controls.columnPairs(chosen, checkpoints), ["q", search.value],
      ["show", show.value === "all" ? "" : show.value], ["mark", mark.checked ? "" : "off"],
    ]);
    render().catch(controls.failed);
  }

  async function render() {
    const n = current, turn = ++turns;
    if (!kept.length) {
      shown.replaceChildren(element("p", "note", "No prompt is left: change search or filter."));
      return;
    }
    const file = await gallery.load(fileOf(n));
    // A later one, which had nothing to load, may have been first.
    if (turn !== turns) return;
    const parts = [element("h2", "", `Prompt ${n + 1} of ${prompts.length}`)];
    parts.push(block(prompts[n], hits(prompts[n], found), "said prompt"));
    parts.push(controls.strip(checkpoints, chosen, at => {
      const answer = answers[n][at];
      return answer < 0 ? "cell absent" : `cell answer hue${answer % 6}`;
    }, at => (answers[n][at] < 0 ? "no answer yet" : `answer ${answers[n][at] + 1}`), setColumn));
    parts.push(columns(n, file.texts), down(n, file.texts));
    shown.replaceChildren(...parts);
  }

  const textOf = (n, column, all) => {
    const at = answers[n][chosen[column]];
    return at < 0 ? null : all[at];
  };

  function columns(n, all) {
    const box = element("div", "columns");
    const base = textOf(n, 0, all), other = textOf(n, 1, all);
    chosen.forEach((at, column) => {
      const answer = textOf(n, column, all), one = checkpoints[at];
      const part = element("section", "column");
      const title = element("h3", "", `${"ABCDEF"[column]}: ${one.name} `);
      title.append(element("small", "", `step ${one.step.toLocaleString("en")}`));
      part.append(title);
      box.append(part);
      if (!answer) {
        part.append(element("p", "note", "No answer of this checkpoint yet."));
        return;
      }
      const against = column ? base : other;
      part.append(said(answer, mark.checked ? marksBetween(answer, against, column > 0) : []));
      part.append(element("p", "note", `${answer.tokens} tokens, ${endOf(answer.finish)}`));
      const spans = controls.verbatim(answer);
      if (spans) part.append(spans);
    });
    return box;
  }

  function marksBetween(answer, against, isLater) {
    if (!against) return [];
    const found = isLater ? difference(against.text, answer.text) : difference(answer.text, against.text);
    return isLater ? found.added : found.removed;
  }

  function said(answer, marks) {
    const all = [...marks, ...hits(answer.text, found), ...controls.verbatimMarks(answer)];
    return block(answer.text, all);
  }

  const endOf = finish => ({
    end: "ended by itself", max_tokens: "cut at the most tokens", context: "cut at the context's end",
  }[finish] || finish);

  // Answers down the checkpoints; neighbours that say the same share an entry. Each has its text at
  // once, and its marks when it comes into sight: 140 differences are thousands of marks.
  function down(n, all) {
    sight.forget();
    const box = element("section", "down");
    box.append(element("h2", "", "Down the checkpoints"));
    let before = null;
    for (let at = 0; at < checkpoints.length;) {
      let end = at + 1;
      while (end < checkpoints.length && answers[n][end] === answers[n][at]) end++;
      const answer = answers[n][at] < 0 ? null : all[answers[n][at]];
      const part = element("article", "entry");
      const to = end - at > 1 ? ` to ${checkpoints[end - 1].name}` : "";
      const title = element("h3", "", `${checkpoints[at].name}${to} `);
      title.append(element("small", "", `${end - at} checkpoint${end - at > 1 ? "s" : ""}`));
      part.append(title);
      if (answer) {
        const earlier = mark.checked ? before : null;
        const text = block(answer.text, []);
        part.append(text);
        sight.wait(part, () => {
          const changes = earlier ? difference(earlier.text, answer.text).added : [];
          text.replaceWith(said(answer, changes));
        });
      } else part.append(element("p", "note", "No answer yet."));
      box.append(part);
      before = answer || before;
      at = end;
    }
    return box;
  }

  function setColumn(at, column) {
    chosen[column] = at;
    redraw();
    update();
  }

  async function searched() {
    found = pattern(search.value);
    update();
    if (!found || loaded) return;
    loaded = await gallery.loadAll(prompts.map((_, n) => fileOf(n)), (there, of) => {
      status.textContent = `loading answers: ${there} of ${of} prompts`;
    });
    update();
  }

  let redraw = () => {};
  function start() {
    const address = controls.readAddress();
    chosen = controls.chosenColumns(address, checkpoints);
    current = Math.min(prompts.length, Math.max(1, Number(address.one("prompt")) || 1)) - 1;
    search.value = address.one("q") || "";
    show.value = address.one("show") in FILTERS ? address.one("show") : "all";
    mark.checked = address.one("mark") !== "off";
    redraw = controls.makeColumns(byId("columns"), checkpoints, chosen, update);
    searched().catch(controls.failed);
  }

  search.addEventListener("input", controls.later(() => searched().catch(controls.failed)));
  show.addEventListener("change", () => update());
  mark.addEventListener("change", () => update());
  addEventListener("hashchange", start);
  keys.listen({
    search, mark, update, kept: () => kept, current: () => current,
    choose: n => { current = n; update(false); scrollTo(0, 0); },
    chosen: () => chosen, count: () => checkpoints.length, moved: () => { redraw(); update(); },
  });
  byId("how").textContent = texts.visible(index.how);
  start();
})().catch(controls.failed);

"use strict";
// Page of evaluations: each item of a task down the checkpoints, chosen ones side by side.
(async () => {
  const { element, block, difference, has, hits, pattern } = texts;
  const { byId } = controls;
  const index = await gallery.load("tasks");
  const pick = byId("task"), search = byId("search"), show = byId("show"), mark = byId("mark");
  const shown = byId("shown"), status = byId("status"), scores = byId("scores");
  const WORDS = { 1: "right", h: "partly", 0: "wrong", "-": "unknown" };
  let task = 0, state = null, chosen = [], current = 0, kept = [], found = null, turns = 0;
  const loaded = new Map();

  const facts = () => index.tasks[task];
  const first = () => chosen[0], last = () => chosen[chosen.length - 1];
  const right = (n, at) => state.right[at][n];
  const block4 = n => String(Math.floor(n / index.itemsAFile)).padStart(4, "0");
  const textFile = n => `task_${task + 1}_text_${block4(n)}`;
  const itemFile = n => `task_${task + 1}_item_${block4(n)}`;
  const FILTERS = {
    all: () => true,
    right: n => right(n, last()) === "1",
    wrong: n => "0h".includes(right(n, last())),
    changed: n => state.answers[n][first()] !== state.answers[n][last()],
    better: n => right(n, first()) !== "1" && right(n, last()) === "1",
    worse: n => right(n, first()) === "1" && right(n, last()) !== "1",
  };

  const list = controls.makeList(byId("list"), (row, at) => {
    const n = kept[at];
    row.append(element("span", "number", n + 1));
    const block = loaded.get(textFile(n));
    const text = block ? block[n % index.itemsAFile] : null;
    const line = text ? text.prompt.replace(/\s+/g, " ").slice(-160) : "...";
    const named = element("span", "text", line);
    named.dir = "auto";
    row.append(named);
    for (const column of [first(), last()]) {
      const word = WORDS[right(n, column)];
      row.append(element("span", `badge ${word}`, word));
    }
    if (!text) fetchTexts(n);
  }, at => {
    current = kept[at];
    update(false);
  });

  // Texts of rows that come into sight.
  function fetchTexts(n) {
    const of = task, name = textFile(n);
    gallery.load(name).then(block => {
      if (loaded.has(name)) return;
      loaded.set(name, block);
      if (of === task) list(kept.length, kept.indexOf(current));
    }).catch(controls.failed);
  }

  function matches(n) {
    const block = loaded.get(textFile(n));
    if (!block) return false;
    const one = block[n % index.itemsAFile];
    return has(one.prompt, found) || has(one.target, found) || has(one.item, found)
      || one.choices.some(t => has(t.text, found))
      || one.answers.some(samples => samples.some(t => has(t.text, found)));
  }

  function update(again = true) {
    const one = facts();
    if (again) {
      const filter = FILTERS[show.value] || FILTERS.all;
      kept = state.answers.map((_, n) => n).filter(n => filter(n) && (!found || matches(n)));
      if (kept.length && !kept.includes(current)) current = kept[0];
      drawScores();
    }
    list(kept.length, kept.indexOf(current));
    status.textContent = `${kept.length.toLocaleString("en")} of ${one.items.toLocaleString("en")} `
      + `items, ${one.checkpoints.length} checkpoints`;
    controls.writeAddress([
      ["task", one.task], ["item", current + 1], ...controls.columnPairs(chosen, one.checkpoints),
      ["q", search.value], ["show", show.value === "all" ? "" : show.value],
      ["mark", mark.checked ? "" : "off"],
    ]);
    render().catch(controls.failed);
  }

  function drawScores() {
    const one = facts();
    const said = [`version ${one.version}`, one.harness, `${one.shots} shots`];
    if (one.style !== "default") said.push(`style ${one.style}`);
    if (one.limit) said.push(`only ${one.limit} items`);
    if (one.metric) said.push(`right by ${one.metric}`);
    byId("how").textContent = texts.visible(said.join(", "));
    scores.replaceChildren(chart.lines(`${one.task}: scores`, one.checkpoints, one.scores, chosen));
  }

  async function render() {
    const n = current, one = facts(), turn = ++turns;
    if (!kept.length) {
      shown.replaceChildren(element("p", "note", "No item is left: change search or filter."));
      return;
    }
    const [textBlock, itemBlock] = await Promise.all([gallery.load(textFile(n)), gallery.load(itemFile(n))]);
    // A later one, which had nothing to load, may have been first.
    if (turn !== turns) return;
    const text = textBlock[n % index.itemsAFile], numbers = itemBlock[n % index.itemsAFile];
    const parts = [element("h2", "", `Item ${n + 1} of ${one.items}: ${text.item}`)];
    const prompt = block(text.prompt, hits(text.prompt, found), "said prompt tall");
    prompt.tabIndex = 0;
    prompt.setAttribute("role", "region");
    prompt.setAttribute("aria-label", "Prompt");
    parts.push(prompt);
    if (text.target) parts.push(element("h3", "", "Right answer"), block(text.target, hits(text.target, found)));
    parts.push(controls.strip(one.checkpoints, chosen, at => `cell ${WORDS[right(n, at)]}`,
      at => WORDS[right(n, at)], setColumn));
    parts.push(columns(n, text, numbers));
    if (text.choices.length) {
      const lines = text.choices.map((choice, c) => ({
        name: `${c + 1}: ${choice.text.trim().slice(0, 40)}`,
        values: numbers.likelihoods.map(values => (values && c in values ? values[c] : null)),
      }));
      parts.push(chart.lines("Log-likelihood of each choice", one.checkpoints, lines, chosen));
      const spans = text.choices.map(controls.verbatim).filter(part => part && part.tagName === "DETAILS");
      if (spans.length) parts.push(element("h3", "", "Choices in the training data"), ...spans);
    }
    shown.replaceChildren(...parts);
  }

  function columns(n, text, numbers) {
    const box = element("div", "columns");
    const samplesOf = column => text.answers[state.answers[n][chosen[column]]] || null;
    chosen.forEach((at, column) => {
      const one = facts().checkpoints[at], part = element("section", "column");
      const title = element("h3", "", `${"ABCDEF"[column]}: ${one.name} `);
      const word = WORDS[right(n, at)];
      title.append(element("span", `badge ${word}`, word));
      part.append(title);
      if (numbers.otherPrompt.includes(at)) {
        part.append(element("p", "warning", "This checkpoint was given another prompt."));
      }
      if (text.choices.length) part.append(choices(text, numbers.likelihoods[at], state.answers[n][at]));
      const samples = text.choices.length ? null : samplesOf(column);
      if (samples) part.append(...generated(samples, column ? samplesOf(0) : samplesOf(1), column > 0));
      else if (!text.choices.length) part.append(element("p", "note", "No answer of this checkpoint."));
      box.append(part);
    });
    return box;
  }

  // Choices with a bar each: their probability among the choices.
  function choices(text, given, answer) {
    // A logarithm of zero is the string "-Infinity".
    const values = given && given.map(Number);
    const made = element("table", "choices");
    made.append(element("caption", "", "log-likelihood, and share among the choices"));
    const highest = values ? Math.max(...values) : 0;
    const sum = values ? values.reduce((all, value) => all + Math.exp(value - highest), 0) : 1;
    text.choices.forEach((choice, c) => {
      const row = element("tr", c === answer ? "answered" : "");
      const says = [c === answer ? "chosen" : "", c === text.right ? "right" : ""].filter(Boolean);
      row.append(element("td", "says", says.join(", ")));
      const said = element("td", "choice");
      said.append(block(choice.text, hits(choice.text, found)));
      row.append(said, element("td", "value", values && c in values ? values[c].toFixed(2).replace("Infinity", "∞") : "-"));
      const cell = element("td", "share"), bar = element("meter");
      const share = values && c in values && Number.isFinite(highest)
        ? Math.exp(values[c] - highest) / sum : 0;
      bar.max = 1;
      bar.value = share;
      bar.textContent = bar.title = `${(100 * share).toFixed(1)} %`;
      bar.setAttribute("aria-label", `share of choice ${c + 1}`);
      cell.append(bar);
      row.append(cell);
      made.append(row);
    });
    return made;
  }

  function generated(samples, against, isLater) {
    return samples.flatMap((answer, k) => {
      const other = against && against[k];
      let marks = [];
      if (mark.checked && other) {
        marks = isLater ? difference(other.text, answer.text).added
          : difference(answer.text, other.text).removed;
      }
      const all = [...marks, ...hits(answer.text, found), ...controls.verbatimMarks(answer)];
      const title = samples.length > 1 ? [element("h3", "", `Sample ${k + 1}`)] : [];
      const spans = controls.verbatim(answer);
      return [...title, block(answer.text, all), ...(spans ? [spans] : [])];
    });
  }

  function setColumn(at, column) {
    chosen[column] = at;
    redraw();
    update();
  }

  async function searched() {
    found = pattern(search.value);
    const names = [];
    for (let n = 0; n < facts().items; n += index.itemsAFile) names.push(textFile(n));
    if (found && names.some(name => !loaded.has(name))) {
      const of = task;
      const blocks = await gallery.loadAll(names, (there, all) => {
        status.textContent = `loading texts: ${there} of ${all} files`;
      });
      blocks.forEach((block, n) => loaded.set(names[n], block));
      if (of !== task) return;
    }
    update();
  }

  let redraw = () => {};
  async function open(number, address) {
    const content = await gallery.load(`task_${number + 1}`);
    task = number;
    state = content;
    pick.value = number;
    chosen = controls.chosenColumns(address, facts().checkpoints);
    current = Math.min(facts().items, Math.max(1, Number(address.one("item")) || 1)) - 1;
    redraw = controls.makeColumns(byId("columns"), facts().checkpoints, chosen, update);
    await searched();
  }

  function start() {
    const address = controls.readAddress();
    search.value = address.one("q") || "";
    show.value = address.one("show") in FILTERS ? address.one("show") : "all";
    mark.checked = address.one("mark") !== "off";
    const named = index.tasks.findIndex(one => one.task === address.one("task"));
    open(Math.max(0, named), address).catch(controls.failed);
  }

  index.tasks.forEach((one, n) => {
    const option = element("option", "", one.task);
    option.value = n;
    pick.append(option);
  });
  pick.addEventListener("change", () => {
    const names = facts().checkpoints, same = chosen.map(n => names[n].name);
    const keeps = { one: () => null, all: letters => letters.map((_, n) => same[n] ?? null) };
    open(Number(pick.value), keeps).catch(controls.failed);
  });
  search.addEventListener("input", controls.later(() => searched().catch(controls.failed)));
  show.addEventListener("change", () => update());
  mark.addEventListener("change", () => update());
  addEventListener("hashchange", start);
  keys.listen({
    search, mark, update, kept: () => kept, current: () => current,
    choose: n => { current = n; update(false); },
    chosen: () => chosen, count: () => facts().checkpoints.length, moved: () => { redraw(); update(); },
  });
  start();
})().catch(controls.failed);

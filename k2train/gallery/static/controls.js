"use strict";
// Controls that both pages share: address, list, columns, strip of checkpoints, verbatim spans.
const controls = (() => {
  const { element, visible } = texts;
  const byId = id => document.getElementById(id);
  const MOST_COLUMNS = 6;

  // What the address asks for, as plain values by name; repeated names are a list.
  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    return { one: name => given.get(name), all: names => names.map(n => given.get(n)) };
  }

  function writeAddress(pairs) {
    const given = new URLSearchParams(pairs.filter(pair => pair[1] !== null && pair[1] !== ""));
    history.replaceState(null, "", `#${given}`);
  }

  // A list of any length of which only the rows in sight are in the page.
  function makeList(box, fill, choose) {
    const height = 46, space = element("div", "space");
    box.append(space);
    let count = 0, chosen = -1, waiting = false;

    function draw() {
      waiting = false;
      const first = Math.max(0, Math.floor(box.scrollTop / height) - 4);
      const last = Math.min(count, Math.ceil((box.scrollTop + box.clientHeight) / height) + 4);
      const rows = [];
      for (let n = first; n < last; n++) {
        const row = element("div", "row");
        row.id = `row_${n}`;
        row.setAttribute("role", "option");
        row.setAttribute("aria-posinset", n + 1);
        row.setAttribute("aria-setsize", count);
        row.setAttribute("aria-selected", n === chosen);
        row.style.top = `${n * height}px`;
        row.addEventListener("click", () => choose(n));
        fill(row, n);
        rows.push(row);
      }
      space.replaceChildren(...rows);
      box.setAttribute("aria-activedescendant", chosen >= first && chosen < last ? `row_${chosen}` : "");
    }

    box.addEventListener("scroll", () => {
      if (!waiting) requestAnimationFrame(draw);
      waiting = true;
    });
    addEventListener("resize", draw);
    box.addEventListener("keydown", event => {
      const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      choose(Math.min(count - 1, Math.max(0, chosen + by)));
    });

    return (newCount, newChosen) => {
      count = newCount;
      chosen = newChosen;
      space.style.height = `${count * height}px`;
      const top = chosen * height;
      if (chosen >= 0 && (top < box.scrollTop || top + height > box.scrollTop + box.clientHeight)) {
        box.scrollTop = top - (box.clientHeight - height) / 2;
      }
      draw();
    };
  }

  const LETTERS = "abcdef";

  // A choice of checkpoints, two or more; `chosen` are their numbers, and `changed` is called.
  function makeColumns(box, checkpoints, chosen, changed) {
    function select(column) {
      const label = element("label", "", `${LETTERS[column].toUpperCase()} `);
      const made = element("select");
      made.id = `column_${LETTERS[column]}`;
      checkpoints.forEach((one, n) => {
        const option = element("option", "", `${one.name}, step ${one.step.toLocaleString("en")}`);
        option.value = n;
        made.append(option);
      });
      made.value = chosen[column];
      made.addEventListener("change", () => {
        chosen[column] = Number(made.value);
        changed();
      });
      label.append(made);
      return label;
    }

    function button(text, id, does) {
      const made = element("button", "", text);
      made.type = "button";
      made.id = id;
      made.addEventListener("click", () => {
        does();
        draw();
        changed();
      });
      return made;
    }

    function draw() {
      const parts = chosen.map((_, column) => select(column));
      if (chosen.length < MOST_COLUMNS) {
        parts.push(button("Add", "add", () => chosen.push(checkpoints.length - 1)));
      }
      if (chosen.length > 2) parts.push(button("Remove", "remove", () => chosen.pop()));
      box.replaceChildren(...parts);
    }

    draw();
    return draw;
  }

  // Numbers of the checkpoints that an address names; the first and the last where it does not.
  function chosenColumns(address, checkpoints) {
    const wanted = address.all([...LETTERS]).filter(name => name !== null);
    const found = wanted.map(name => checkpoints.findIndex(one => one.name === name));
    const known = found.filter(n => n >= 0);
    const last = checkpoints.length - 1;
    if (known.length >= 2) return known;
    return known.length ? [known[0], last] : [0, last];
  }

  function columnPairs(chosen, checkpoints) {
    return chosen.map((n, column) => [LETTERS[column], checkpoints[n].name]);
  }

  // A button for each checkpoint. `kind` names the look of one, `title` says what it is.
  function strip(checkpoints, chosen, kind, title, choose) {
    const made = element("div", "strip");
    made.setAttribute("role", "group");
    made.setAttribute("aria-label", "Checkpoints");
    const last = chosen[chosen.length - 1];
    checkpoints.forEach((one, n) => {
      const cell = element("button", kind(n));
      cell.type = "button";
      cell.title = visible(`${one.name}, step ${one.step.toLocaleString("en")}: ${title(n)}`);
      cell.setAttribute("aria-label", cell.title);
      // One stop of the tab key for all of them; the arrow keys move the last column anyway.
      cell.tabIndex = n === last ? 0 : -1;
      const column = chosen.indexOf(n);
      if (column >= 0) {
        cell.classList.add("chosen");
        cell.textContent = LETTERS[column].toUpperCase();
      }
      cell.addEventListener("click", event => choose(n, event.shiftKey ? 0 : chosen.length - 1));
      made.append(cell);
    });
    return made;
  }

  // What is known of a text in the training data.
  function verbatim(answer) {
    if (answer.spans === undefined) return null;
    if (!answer.spans.length) {
      return element("p", "note", "Not in the training data: no 8 tokens in a row.");
    }
    const made = element("details", "verbatim");
    const longest = answer.spans[0].tokens;
    made.append(element("summary", "", `In the training data: ${longest} tokens in a row`));
    for (const span of answer.spans) {
      const part = element("div", "span");
      const text = answer.text.slice(span.first, span.last);
      const places = span.count === 1 ? "1 place" : `${span.count.toLocaleString("en")} places`;
      part.append(element("strong", "", `${span.tokens} tokens, ${places}`));
      part.append(texts.block(text, [], "said quote"));
      for (const place of span.places) {
        const lines = element("ul");
        lines.append(element("li", "", `${place.chunk} row ${place.row}, ${place.data}`));
        for (const line of [...place.documents, ...place.uses]) lines.append(element("li", "", line));
        part.append(lines);
      }
      made.append(part);
    }
    return made;
  }

  // The same as marks on the text.
  function verbatimMarks(answer) {
    return (answer.spans || []).map(span => [span.first, span.last, "verbatim"]);
  }

  // Moves a column by one checkpoint, within what there is.
  function moved(chosen, column, by, count) {
    const to = Math.min(count - 1, Math.max(0, chosen[column] + by));
    const changes = to !== chosen[column];
    chosen[column] = to;
    return changes;
  }

  // Does something for an element when it is about to be seen, or printed.
  function whenInSight() {
    let waiting = new Map();
    const fill = element => {
      const does = waiting.get(element);
      waiting.delete(element);
      watcher.unobserve(element);
      if (does) does();
    };
    const watcher = new IntersectionObserver(
      seen => seen.filter(one => one.isIntersecting).forEach(one => fill(one.target)),
      { rootMargin: "600px" },
    );
    addEventListener("beforeprint", () => [...waiting.keys()].forEach(fill));
    return {
      wait: (element, does) => {
        waiting.set(element, does);
        watcher.observe(element);
      },
      forget: () => {
        watcher.disconnect();
        waiting = new Map();
      },
    };
  }

  function later(does) {
    let timer = 0;
    return () => {
      clearTimeout(timer);
      timer = setTimeout(does, 120);
    };
  }

  function failed(error) {
    byId("status").textContent = visible(error.message);
  }

  return {
    byId, chosenColumns, columnPairs, failed, later, makeColumns, makeList, moved,
    readAddress, strip, verbatim, verbatimMarks, whenInSight, writeAddress,
  };
})();

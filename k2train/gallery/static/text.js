"use strict";
// Text of a model, shown as text: characters that hide or reorder become visible; marks on words.
//
// - Nothing here makes HTML: text goes into text nodes.
// - A mark is [start, end, kind] in UTF-16 units; marks may overlap.
const texts = (() => {
  const HIDDEN =
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]|[\ud800-\udfff]/gu;
  const WORD = /\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu;
  // Beyond this a difference would take longer than a reader waits.
  const MOST_CELLS = 4e6;

  function visible(text) {
    return text.replace(HIDDEN, one => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);
  }

  // Puts a text with its marks into a node, in place of what is there.
  function paint(node, text, marks = []) {
    const cuts = new Set([0, text.length]);
    for (const [start, end] of marks) cuts.add(start).add(end);
    const at = [...cuts].sort((a, b) => a - b);

    const parts = [];
    for (let n = 0; n + 1 < at.length; n++) {
      const piece = visible(text.slice(at[n], at[n + 1]));
      const kinds = marks.filter(([start, end]) => start <= at[n] && at[n + 1] <= end);
      if (!kinds.length) {
        parts.push(document.createTextNode(piece));
        continue;
      }
      const names = [...new Set(kinds.map(mark => mark[2]))];
      const mark = element(tagOf(names), names.join(" "));
      mark.textContent = piece;
      parts.push(mark);
    }
    node.replaceChildren(...parts);
  }

  function tagOf(names) {
    if (names.includes("added")) return "ins";
    return names.includes("removed") ? "del" : "mark";
  }

  function element(tag, kind, text) {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    if (text !== undefined) made.textContent = visible(String(text));
    return made;
  }

  // A block for foreign text: its direction is its own and reaches no further.
  function block(text, marks, kind = "said") {
    const made = element("div", kind);
    made.dir = "auto";
    paint(made, text, marks);
    if (!text.trim()) made.append(element("em", "none", text ? "(only white space)" : "(nothing)"));
    return made;
  }

  // Marks for the words that only one of two texts has: { removed, added }.
  function difference(before, after) {
    const a = before.match(WORD) || [], b = after.match(WORD) || [];
    let start = 0, aEnd = a.length, bEnd = b.length;
    while (start < aEnd && start < bEnd && a[start] === b[start]) start++;
    while (aEnd > start && bEnd > start && a[aEnd - 1] === b[bEnd - 1]) aEnd--, bEnd--;

    const kept = common(a.slice(start, aEnd), b.slice(start, bEnd));
    return {
      removed: changed(a, start, aEnd, kept.a, "removed"),
      added: changed(b, start, bEnd, kept.b, "added"),
    };
  }

  // Which words belong to a longest common subsequence; none where the texts are too long for it.
  function common(a, b) {
    const kept = { a: new Set(), b: new Set() };
    if (a.length * b.length > MOST_CELLS) return kept;
    const width = b.length + 1;
    const length = new Uint32Array((a.length + 1) * width);
    for (let i = a.length - 1; i >= 0; i--) {
      for (let j = b.length - 1; j >= 0; j--) {
        length[i * width + j] = a[i] === b[j]
          ? length[(i + 1) * width + j + 1] + 1
          : Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
      }
    }
    for (let i = 0, j = 0; i < a.length && j < b.length;) {
      if (a[i] === b[j]) kept.a.add(i++), kept.b.add(j++);
      else if (length[(i + 1) * width + j] >= length[i * width + j + 1]) i++;
      else j++;
    }
    return kept;
  }

  function changed(words, start, end, kept, kind) {
    const marks = [];
    let at = 0;
    words.forEach((word, n) => {
      const next = at + word.length;
      if (n >= start && n < end && !kept.has(n - start)) {
        const name = word.trim() ? kind : `${kind} blank`, last = marks[marks.length - 1];
        if (last && last[1] === at && last[2] === name) last[1] = next;
        else marks.push([at, next, name]);
      }
      at = next;
    });
    return marks;
  }

  // What a reader searches, without regard to case; null for nothing.
  function pattern(query) {
    return query ? new RegExp(query.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "giu") : null;
  }

  function has(text, found) {
    found.lastIndex = 0;
    return found.test(text);
  }

  function hits(text, found) {
    if (!found) return [];
    // Where the last test ended, a match would begin.
    found.lastIndex = 0;
    return [...text.matchAll(found)].map(m => [m.index, m.index + m[0].length, "hit"]);
  }

  return { block, difference, element, has, hits, paint, pattern, visible };
})();

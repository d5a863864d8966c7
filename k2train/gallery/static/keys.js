"use strict";
// Keys of both pages: next and previous, a checkpoint back and on, differences, search, help.
const keys = (() => {
  const { byId, moved } = controls;

  // `page` has its fields search and mark, and functions: kept(), current() and choose(n) for what
  // is listed; chosen() and count() for columns and checkpoints; moved() and update() to draw.
  function listen(page) {
    const step = by => () => {
      const all = page.kept(), at = all.indexOf(page.current()) + by;
      if (at >= 0 && at < all.length) page.choose(all[at]);
    };
    const shift = by => event => {
      const chosen = page.chosen(), column = event.shiftKey ? 0 : chosen.length - 1;
      if (moved(chosen, column, by, page.count())) page.moved();
    };
    const toggle = () => {
      page.mark.checked = !page.mark.checked;
      page.update();
    };
    const does = {
      j: step(1), k: step(-1), ArrowRight: shift(1), ArrowLeft: shift(-1), d: toggle,
      "/": () => {
        page.search.focus();
        page.search.select();
      },
      "?": () => byId("keys").showModal(),
    };
    listenTo(does, page.search);
  }

  // In a field only Escape counts, which leaves and empties it.
  function listenTo(does, search) {
    const help = byId("keys");
    search.form.addEventListener("submit", event => event.preventDefault());
    byId("help").addEventListener("click", () => help.showModal());
    byId("close").addEventListener("click", () => help.close());
    document.addEventListener("keydown", event => {
      if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
      const field = event.target.closest("input, select, textarea");
      if (event.key === "Escape") {
        search.value = "";
        search.dispatchEvent(new Event("input"));
        if (field) field.blur();
      } else if (!field && does[event.key]) {
        event.preventDefault();
        does[event.key](event);
      }
    });
  }

  return { listen };
})();

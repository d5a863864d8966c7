"use strict";
// Data of a gallery, loaded when a page needs them.
//
// - A page opened from a disk may run scripts, but may not read files. So each data file is a script
//   that calls gallery.take with its name and one JSON value.
// - What was loaded stays: 28,000 answers of 400 characters are about 20 MB.
const gallery = (() => {
  const base = document.currentScript.src.replace(/[^/]*$/, "");
  const wanted = new Map();

  function load(name) {
    if (wanted.has(name)) return wanted.get(name).promise;
    const entry = {};
    entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
    wanted.set(name, entry);

    const script = document.createElement("script");
    script.src = `${base}data_${name}.js`;
    script.addEventListener("load", () => script.remove());
    script.addEventListener("error", () => {
      // A later try may find the file.
      wanted.delete(name);
      script.remove();
      entry.reject(new Error(`data_${name}.js is not there; write the gallery again`));
    });
    document.head.append(script);
    return entry.promise;
  }

  function take(name, value) {
    const entry = wanted.get(name);
    if (entry) entry.resolve(value);
  }

  // Loads files a few at a time; `progress` hears how many are there.
  async function loadAll(names, progress) {
    const found = [];
    const atOnce = 32;
    for (let first = 0; first < names.length; first += atOnce) {
      found.push(...await Promise.all(names.slice(first, first + atOnce).map(load)));
      progress(found.length, names.length);
    }
    return found;
  }

  return { load, loadAll, take };
})();

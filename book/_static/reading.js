// Where a reader is: a bar for the page, a mark at each chapter in the sidebar, and keys with a dialog that lists them.
// What was read stays in this browser. Where the browser keeps nothing, all works for as long as the page is open.
// tests/book/test_reading.py uses it.
"use strict";

(function () {
  const KEPT = "peftlab-reading"; // in localStorage: {keys: false, pages: {"book/02_lora": {seen: ["ids"], of: 17}}}
  const CHAPTER = /book\/\d\d_\w+$/;
  const here = DOCUMENTATION_OPTIONS.pagename;
  const make = (html) => document.createRange().createContextualFragment(html).firstElementChild;

  function recall() {
    try {
      const found = JSON.parse(localStorage.getItem(KEPT));
      const whole = Object.entries(found.pages).filter(([, page]) => Array.isArray(page?.seen) && page.of > 0);
      return { keys: found.keys !== false, pages: Object.fromEntries(whole) };
    } catch { /* nothing is kept, or what is kept is not ours */ }
    return { keys: true, pages: {} };
  }

  function keep() {
    try { localStorage.setItem(KEPT, JSON.stringify(kept)); } catch { /* the browser keeps nothing */ }
  }

  const kept = recall();

  // --- the bar, and the sections whose end was on the screen
  const bar = make('<div class="reading-bar" aria-hidden="true"></div>');
  const sections = CHAPTER.test(here) ? [...document.querySelectorAll("article > section > section[id]")] : [];
  let waiting = false;

  function follow() {
    waiting = false;
    const page = document.documentElement;
    const most = page.scrollHeight - innerHeight;
    bar.style.transform = `scaleX(${most > 0 ? Math.min(scrollY / most, 1) : 0})`;
    const seen = new Set(kept.pages[here]?.seen);
    const before = seen.size;
    for (const section of sections) {
      const end = section.getBoundingClientRect().bottom;
      if (end > 0 && end <= innerHeight + 1) seen.add(section.id);
    }
    if (seen.size === before && kept.pages[here]?.of === sections.length) return;
    if (!seen.size) return;
    const known = sections.map((section) => section.id).filter((id) => seen.has(id)); // sections may have been renamed
    kept.pages[here] = { seen: known, of: sections.length };
    keep();
    showMarks();
  }

  function soon() {
    if (!waiting) requestAnimationFrame(follow);
    waiting = true;
  }

  // --- the marks, and what forgets them
  const tools = make(`<div class="reading-tools">
    <p hidden></p>
    <button type="button" class="btn btn-sm" hidden>Forget what I read</button>
    <button type="button" class="btn btn-sm">Keys <kbd>?</kbd></button>
  </div>`);
  const [forget, help] = tools.querySelectorAll("button");

  function pageOf(link) {
    return new URL(link.href).pathname.match(/book\/\w+(?=\.html$)/)?.[0];
  }

  function showMarks() {
    const chapters = [...document.querySelectorAll(".bd-docs-nav a.reference")].filter((a) => CHAPTER.test(pageOf(a)));
    let through = 0;
    for (const link of chapters) {
      link.querySelector(".reading-mark")?.remove();
      const { seen, of } = kept.pages[pageOf(link)] || {};
      if (!seen?.length) continue;
      const all = seen.length >= of;
      through += all;
      link.append(make(all ? '<span class="reading-mark">✓<span class="visually-hidden"> read</span></span>'
        : '<span class="reading-mark"><span class="visually-hidden">, sections read: </span></span>'));
      if (!all) link.lastElementChild.append(`${seen.length}/${of}`);
    }
    const told = tools.querySelector("p");
    told.textContent = `Read through: ${through} of ${chapters.length} chapters.`;
    told.hidden = forget.hidden = !Object.keys(kept.pages).length;
  }

  forget.addEventListener("click", () => {
    kept.pages = {};
    keep();
    showMarks();
    help.focus(); // the button that was pressed is gone
  });

  // --- the keys. Each is one letter, so they can be switched off (WCAG 2.1, 2.1.4), and none is one of the browser's.
  const press = (selector) => document.querySelector(selector)?.click();
  const KEYS = {
    n: ["the next page", () => press(".prev-next-area .right-next")],
    p: ["the page before", () => press(".prev-next-area .left-prev")],
    s: ["search", () => press(".search-button__button")],
    d: ["dark, light, or as the system is", () => press(".theme-switch-button")],
    "?": ["this list", open],
  };
  const OTHERS = { "Ctrl K": "search (⌘ K on a Mac)", Tab: "to the next link; it shows what a reference refers to", Escape: "closes what is open" };
  const row = ([key, told]) => `<tr><th scope="row">${key.split(" ").map((one) => `<kbd>${one}</kbd>`).join(" ")}</th><td>${told}</td></tr>`;
  const dialog = make(`<dialog class="reading-keys" aria-labelledby="reading-keys-title">
    <h2 id="reading-keys-title">Keys</h2>
    <table><tbody>${Object.entries(KEYS).map(([key, [told]]) => row([key, told])).join("")}</tbody></table>
    <label><input type="checkbox"> These single keys are on</label>
    <table><tbody>${Object.entries(OTHERS).map(row).join("")}</tbody></table>
    <form method="dialog"><button class="btn btn-sm">Close</button></form>
  </dialog>`);
  const on = dialog.querySelector("input");
  on.checked = kept.keys;
  on.addEventListener("change", () => {
    kept.keys = on.checked;
    keep();
  });

  function open() {
    dialog.showModal();
  }

  help.addEventListener("click", open);
  const TYPED = "input, select, textarea, [contenteditable], [role='textbox'], [role='combobox'], [role='slider']";
  document.addEventListener("keydown", (event) => {
    if (!on.checked || event.defaultPrevented || event.isComposing || event.repeat) return;
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest?.(TYPED)) return;
    if (document.querySelector("dialog[open]") || !Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault();
    KEYS[event.key][1]();
  });

  document.body.append(bar, dialog);
  document.querySelector(".sidebar-primary-items__end")?.prepend(tools);
  showMarks();
  addEventListener("scroll", soon, { passive: true });
  addEventListener("resize", soon);
  soon();
})();

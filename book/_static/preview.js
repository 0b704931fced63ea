// A reference shows what it refers to, under the mouse and on keyboard focus: a section's beginning, an equation, a
// figure, a term, a paper. The HTML comes from _static/pages, which has the text of each page as a script: a page that was
// opened as a file may load scripts, but may not fetch. Nothing is shown on touch, and what cannot be loaded stays a
// plain link. tests/book/test_preview.py opens some.
"use strict";

(function () {
  const LINKS = "a[href*='#']:not(.headerlink), a.reference.external";
  const ROOT = new URL(document.documentElement.dataset.content_root || "./", location.href).href;
  const BIBLIOGRAPHY = "book/appendix_bibliography";
  const DELAY = 150; // milliseconds, so that a mouse on its way opens nothing, and can move into the preview
  const ENOUGH = 400; // characters of a section
  const pages = new Map(); // promises of documents, by the page's name
  const arrived = new Map(); // what to do with the text of a page that was asked for
  const previews = new Map(); // promises of elements, by the link's address
  let mathjax; // a promise, where the page came without it
  let timer, link, shown; // the link whose preview is wanted, and the preview that is seen

  // what the scripts call
  window.peftlabPage = (name, html) => arrived.get(name)?.(new DOMParser().parseFromString(html, "text/html"));

  function read(name) {
    if (!pages.has(name)) {
      pages.set(name, new Promise((resolve) => {
        arrived.set(name, resolve);
        load(`pages/${name}.js`).catch(() => resolve(null));
      }));
    }
    return pages.get(name);
  }

  function load(path) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `${ROOT}_static/${path}`;
      script.addEventListener("load", resolve);
      script.addEventListener("error", reject);
      document.head.append(script);
    });
  }

  // A page without formulas comes without MathJax.
  async function typeset(preview) {
    if (!preview.querySelector(".math")) return;
    if (!window.MathJax) {
      window.MathJax = { options: { enableMenu: false }, startup: { typeset: false } };
      mathjax = load("vendor/mathjax/tex-chtml.js");
    }
    await mathjax;
    await MathJax.startup?.promise;
    await MathJax.typesetPromise?.([preview]);
  }

  // "book/02_lora" for an address in the site
  function nameOf(address) {
    return address.href.startsWith(ROOT) ? address.href.slice(ROOT.length).match(/^(.+)\.html/)?.[1] : undefined;
  }

  function beginning(section) {
    const parts = [section.querySelector("h1, h2, h3, h4")];
    let length = 0;
    for (let next = parts[0].nextElementSibling; next && length < ENOUGH; next = next.nextElementSibling) {
      if (next.matches("section")) break;
      if (!next.matches("p, ul, ol, dl, div.math, blockquote")) continue;
      parts.push(next);
      length += next.textContent.length;
    }
    return parts;
  }

  function definition(term) {
    while (term.previousElementSibling && term.previousElementSibling.matches("dt")) term = term.previousElementSibling;
    const parts = [term];
    while (!parts.at(-1).matches("dd") && parts.at(-1).nextElementSibling) parts.push(parts.at(-1).nextElementSibling);
    return parts;
  }

  function partsOf(page, address) {
    const sameAddress = (a) => decodeURI(a.href) === decodeURI(address.href);
    const target = nameOf(address)
      ? page.getElementById(decodeURIComponent(address.hash.slice(1)))
      : [...page.querySelectorAll(".citation a[href]")].find(sameAddress)?.closest(".citation");
    if (!target) return [];
    if (target.matches("section, section > span")) return beginning(target.closest("section"));
    return target.matches("dt") ? definition(target) : [target];
  }

  // A copy that can stand anywhere: without ids, roles, controls and links, which a tooltip must not have.
  function copy(part, source) {
    const made = document.createElement("div");
    made.append(document.importNode(part, true));
    for (const one of made.querySelectorAll(".headerlink, script, button, .label")) one.remove();
    for (const one of made.querySelectorAll("[id], [role]")) ["id", "role"].forEach((name) => one.removeAttribute(name));
    for (const one of made.querySelectorAll("img")) one.src = new URL(one.getAttribute("src"), source).href;
    for (const one of made.querySelectorAll("a, h1, h2, h3, h4, dt, dd")) {
      const plain = document.createElement(one.matches("a") ? "span" : "div");
      if (one.matches("h1, h2, h3, h4, dt")) plain.className = "title";
      plain.append(...one.childNodes);
      one.replaceWith(plain);
    }
    return made;
  }

  async function make(address) {
    const name = nameOf(address) || BIBLIOGRAPHY;
    const source = `${ROOT}${name}.html`;
    const page = await read(name);
    const parts = page ? partsOf(page, address) : [];
    if (!parts.length) return null;
    const preview = document.createElement("div");
    preview.className = "reference-preview";
    preview.id = `reference-preview-${previews.size}`;
    preview.setAttribute("role", "tooltip");
    preview.append(...parts.map((part) => copy(part, source)));
    preview.style.visibility = "hidden"; // and not `hidden`: MathJax measures the letters around a formula
    document.querySelector("main").append(preview);
    await typeset(preview);
    await Promise.allSettled([...preview.querySelectorAll("img")].map((image) => image.decode()));
    for (const formula of preview.querySelectorAll("[tabindex]")) formula.removeAttribute("tabindex");
    preview.hidden = true;
    return preview;
  }

  function place(preview) {
    const around = preview.offsetParent.getBoundingClientRect();
    const line = link.getClientRects()[0];
    const left = Math.min(line.left, document.documentElement.clientWidth - preview.offsetWidth - 8);
    const above = line.bottom + preview.offsetHeight > innerHeight && line.top > innerHeight - line.bottom;
    preview.style.left = `${Math.max(left, 8) - around.left}px`;
    preview.style.top = `${(above ? line.top - preview.offsetHeight : line.bottom) - around.top}px`;
  }

  async function show(wanted) {
    if (wanted === link) return;
    hide();
    link = wanted;
    if (!previews.has(link.href)) previews.set(link.href, make(new URL(link.href)).catch(() => null));
    const preview = await previews.get(link.href);
    if (wanted !== link || !preview) return;
    shown = preview;
    shown.hidden = false;
    place(shown);
    shown.style.visibility = "visible";
    link.removeAttribute("title"); // the browser's own tooltip would lie over it
    link.setAttribute("aria-describedby", shown.id);
  }

  function hide() {
    clearTimeout(timer);
    link?.removeAttribute("aria-describedby");
    if (shown) shown.hidden = true;
    link = shown = undefined;
  }

  function linkOf(event) {
    return event.target.closest("article") && event.target.closest(LINKS);
  }

  document.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch" || !(event.target instanceof Element)) return;
    const found = linkOf(event);
    clearTimeout(timer);
    if (found) timer = setTimeout(show, DELAY, found);
    else if (!event.target.closest(".reference-preview") && link !== document.activeElement) timer = setTimeout(hide, DELAY);
  });
  document.addEventListener("focusin", (event) => {
    const found = linkOf(event);
    if (found && found.matches(":focus-visible")) show(found);
    else hide();
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
})();

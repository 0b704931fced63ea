// Repairs of the theme's pages that need the running page (those that do not are in _ext/peftlab_site.py).
// tests/book/test_pages.py holds every page to WCAG 2.1 A and AA, and fails without them.
"use strict";

(function () {
  // Voice control names a button by the text one sees, so its label must contain that text. "Search Ctrl+K" is labelled
  // "Search": its text is name enough. The icons' own titles ("Light") count as text that the label lacks.
  // The icon font replaces <i> by <svg> at a time of its own, so each button is watched.
  function nameButtons() {
    for (const button of document.querySelectorAll("button[aria-label]")) {
      nameButton(button);
      new MutationObserver(() => nameButton(button)).observe(button, { childList: true, subtree: true });
    }
  }

  function nameButton(button) {
    for (const icon of button.querySelectorAll("svg, i")) {
      icon.removeAttribute("title");
      icon.removeAttribute("aria-labelledby");
      icon.setAttribute("aria-hidden", "true");
      for (const title of icon.querySelectorAll("title")) title.remove();
    }
    if (button.querySelector(".search-button__kbd-shortcut")) button.removeAttribute("aria-label");
  }

  // The sidebar holds the logo and the search button outside any landmark.
  function nameSidebar() {
    const sidebar = document.getElementById("pst-primary-sidebar");
    if (sidebar && !sidebar.hasAttribute("role")) {
      sidebar.setAttribute("role", "complementary");
      sidebar.setAttribute("aria-label", "Book");
    }
  }

  // What scrolls sideways must be reachable by the keyboard: wide formulas, tables and code on a narrow screen.
  function focusScrolling() {
    for (const box of document.querySelectorAll("mjx-container[display='true'], div.math, pre, .table-scroll, .output")) {
      const scrolls = box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible";
      if (scrolls) box.setAttribute("tabindex", "0");
      else if (box.getAttribute("tabindex") === "0") box.removeAttribute("tabindex");
    }
  }

  // A wide table scrolls in a box of its own instead of widening the page.
  function boxTables() {
    for (const table of document.querySelectorAll("article table")) {
      if (table.closest(".table-scroll")) continue;
      const box = document.createElement("div");
      box.className = "table-scroll";
      table.replaceWith(box);
      box.append(table);
    }
  }

  function repair() {
    nameButtons();
    nameSidebar();
    boxTables();
    focusScrolling();
    window.addEventListener("resize", focusScrolling);
    // folded parts have no width until they are opened
    document.addEventListener("toggle", focusScrolling, true);
    document.addEventListener("click", () => setTimeout(focusScrolling, 0));
    if (window.MathJax && MathJax.startup && MathJax.startup.promise) MathJax.startup.promise.then(focusScrolling);
  }

  if (document.readyState === "complete") repair();
  else window.addEventListener("load", repair);
})();

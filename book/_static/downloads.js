// The menu "Download this page" also offers what was made of the site beside its pages: PDFs, an EPUB, an archive of all.
// made.js says what there is, so that no link leads nowhere. tests/book/test_downloads.py opens the menu.
"use strict";

(function () {
  // A page that was opened as a file may not read the others, from which search takes its extracts: titles must do.
  if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

  const root = new URL(document.documentElement.dataset.content_root || "./", location.href);
  const page = DOCUMENTATION_OPTIONS.pagename.split("/").pop();
  const offers = [
    [`pdf/${page}.pdf`, "PDF of this page", "fa-file-pdf"],
    ["pdf/peft-lab.pdf", "PDF of the book", "fa-book"],
    ["peft-lab.epub", "EPUB of the book", "fa-book-open"],
    ["peft-lab-book.zip", "The site, to read offline", "fa-file-zipper"],
  ];

  function item(path, text, icon) {
    const link = document.createElement("a");
    link.className = "btn btn-sm dropdown-item";
    link.href = new URL(path, root).href;
    link.download = "";
    const [box, sign, words] = ["span", "i", "span"].map((name) => document.createElement(name));
    box.className = "btn__icon-container";
    sign.className = `fas ${icon}`;
    words.className = "btn__text-container";
    words.textContent = `${text} (${(window.peftlabMade[path] / 1e6).toFixed(1)} MB)`;
    box.append(sign);
    link.append(box, words);
    const made = document.createElement("li");
    made.append(link);
    return made;
  }

  const menu = document.querySelector(".dropdown-download-buttons .dropdown-menu");
  if (menu) menu.append(...offers.filter(([path]) => path in window.peftlabMade).map((offer) => item(...offer)));
})();
